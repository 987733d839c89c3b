"""Fine-tuning through the official client against a small server that counts what it was asked."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import openai
import pytest

from ip2p_ray.errors import ConfigError, DatasetError, StageError
from ip2p_ray.triplets.examples import load_examples
from ip2p_ray.triplets.finetune import training_file
from ip2p_ray.triplets.openai_finetune import (
    Tuning,
    TuningConfig,
    finetune_openai,
    read_tuning,
)

KEY = "sk-right"
MODELS = ("davinci-002", "gpt-4o-mini")


class TuningServer(ThreadingHTTPServer):
    """Files and fine-tuning jobs of the API; a job goes on by one of `script` at each look."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = []
        self.jobs = []
        self.script = ["validating_files", "running", "running", "succeeded"]
        self.hang_up = set()
        """Requests, such as "POST /files", that are done once and then not answered."""
        self.failing = 0
        """Looks at a job, from the next on, that end in status 500."""
        self.has_events = True
        self.asked = []

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        path = url.path.removeprefix("/v1")
        self.server.asked.append(f"GET {path}")
        if path == "/files":
            return self.page(self.server.files, query)
        if path == "/fine_tuning/jobs":
            return self.page(self.server.jobs, query)
        job = self.server.jobs[int(path.split("/")[3].removeprefix("job-"))]
        if path.endswith("/events"):
            if not self.server.has_events:
                return self.fail(404, "no such route")
            return self.page(job["told"][::-1], query)
        if self.server.failing:
            self.server.failing -= 1
            return self.fail(500, "broken for now")
        self.look(job)
        return self.answer({name: value for name, value in job.items() if name != "told"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.removeprefix("/v1")
        self.server.asked.append(f"POST {path}")
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.fail(401, "Incorrect API key provided")
        made = self.upload(body) if path == "/files" else self.create(json.loads(body))
        if made is None:
            return None
        if f"POST {path}" in self.server.hang_up:
            self.server.hang_up.remove(f"POST {path}")
            self.close_connection = True
            return None
        return self.answer(made)

    def upload(self, body):
        name = re.search(rb'filename="([^"]*)"', body)[1].decode()
        content = re.search(rb'filename=".*?\r\n\r\n(.*?)\r\n--', body, re.DOTALL)[1]
        file = {"id": f"file-{len(self.server.files)}", "object": "file", "filename": name}
        file |= {"bytes": len(content), "created_at": 0, "purpose": "fine-tune"}
        self.server.files.append({**file, "status": "processed", "content": content.decode()})
        return file

    def create(self, asked):
        if asked["model"] not in MODELS:
            return self.fail(404, f"The model {asked['model']} does not exist")
        job = {"id": f"job-{len(self.server.jobs)}", "object": "fine_tuning.job", "created_at": 0}
        job |= {"status": "validating_files", "fine_tuned_model": None, "error": None, **asked}
        job |= {"hyperparameters": {}, "organization_id": "o", "result_files": [], "told": []}
        self.server.jobs.append(job)
        return {name: value for name, value in job.items() if name != "told"}

    def look(self, job):
        if job["status"] in ("succeeded", "failed"):
            return
        job["status"] = self.server.script.pop(0)
        for number in range(3):
            event = {"id": f"event-{len(job['told'])}", "object": "fine_tuning.job.event"}
            event |= {"created_at": 0, "level": "info", "message": f"{job['status']} {number}"}
            job["told"].append(event)
        if job["status"] == "succeeded":
            job["fine_tuned_model"] = f"ft:{job['model']}:{job.get('suffix')}"
        if job["status"] == "failed":
            job["error"] = {"code": "bad", "message": "the file is bad", "param": None}

    def page(self, found, query):
        ids = [row["id"] for row in found]
        start = ids.index(query["after"]) + 1 if "after" in query else 0
        limit = min(int(query.get("limit", 20)), 2)  # so that there are pages
        rows = found[start : start + limit]
        return self.answer({"object": "list", "data": rows, "has_more": start + limit < len(found)})

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status, message):
        self.answer({"error": {"message": message, "type": "invalid", "code": None}}, status)


@pytest.fixture
def server():
    with TuningServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def examples():
    return load_examples()[:20]


@pytest.fixture
def state(tmp_path):
    return tmp_path / "runs" / "tuning.json"


def tune(client, examples, state, config=None, **options):
    settings = {"sleep": lambda seconds: None, **options}
    return list(finetune_openai(client, examples, config or TuningConfig(), state, **settings))


def test_examples_are_uploaded_and_a_job_is_followed_to_its_model(server, client, examples, state):
    pauses = []
    config = TuningConfig(epochs=2, suffix="mine", seed=5)
    told = tune(client, examples, state, config, poll_s=7.0, sleep=pauses.append)
    assert [file["content"].encode() for file in server.files] == [training_file(examples)]
    [job] = server.jobs
    assert job["training_file"] == "file-0"
    assert job["method"]["supervised"]["hyperparameters"] == {"n_epochs": 2}
    assert (job["model"], job["suffix"], job["seed"]) == ("davinci-002", "mine", 5)
    statuses = list(dict.fromkeys(tuning.status for tuning in told))
    assert statuses == ["uploaded", "created", "validating_files", "running", "succeeded"]
    seen = [tuning.message for tuning in told if tuning.message]
    looks = ("validating_files", "running", "running", "succeeded")
    expected = [f"{status} {number}" for status in looks for number in range(3)]
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys(expected))
    assert told[-1].done
    assert told[-1].model == "ft:davinci-002:mine"
    assert pauses == [7.0] * 3
    assert read_tuning(state) == told[-1]
    assert [path.name for path in state.parent.iterdir()] == [state.name]


def test_chat_models_are_given_messages(server, client, examples, state):
    config = TuningConfig(model="gpt-4o-mini", form="chat")
    assert tune(client, examples, state, config)[-1].done
    assert server.files[0]["content"].encode() == training_file(examples, "chat")


def test_a_finished_job_is_told_without_asking(server, client, examples, state):
    done = tune(client, examples, state)[-1]
    server.asked.clear()
    assert tune(client, examples, state) == [done]
    assert server.asked == []


def test_whenever_it_is_stopped_the_same_call_goes_on(server, client, examples, state):
    """Stopped after every single thing that is told, again and again."""
    told = []
    while not told or not told[-1].done:
        steps = finetune_openai(client, examples, TuningConfig(), state, sleep=lambda _: None)
        told.append(next(steps))
        steps.close()
    assert len(server.files) == len(server.jobs) == 1
    messages = [tuning.message for tuning in told if tuning.event_id]
    assert len(server.jobs[0]["told"]) == 12
    assert {event["message"] for event in server.jobs[0]["told"]} == set(messages)


@pytest.mark.parametrize("lost", ["POST /files", "POST /fine_tuning/jobs"])
def test_what_the_server_did_without_answering_is_found(server, client, examples, state, lost):
    server.hang_up.add(lost)
    with pytest.raises(StageError, match=r"the server does not answer: .*goes on from .*tuning.js"):
        tune(client, examples, state)
    assert tune(client, examples, state)[-1].done
    assert len(server.files) == len(server.jobs) == 1
    assert server.asked.count(lost) == 1


def test_what_the_server_never_heard_is_asked_again(server, client, examples, state):
    """A kill between the note and the request."""
    nowhere = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key=KEY, max_retries=0)
    with nowhere, pytest.raises(StageError, match="does not answer"):
        tune(nowhere, examples, state)
    assert read_tuning(state).status == "uploading"
    assert tune(client, examples, state)[-1].done
    assert len(server.files) == len(server.jobs) == 1


def test_a_server_that_fails_for_a_while_is_asked_on(server, client, examples, state):
    server.failing = 9
    assert tune(client, examples, state)[-1].done
    state.unlink()
    server.script, server.failing = ["running", "succeeded"], 10
    with pytest.raises(StageError, match=r"does not answer: .*broken for now"):
        tune(client, examples, state)
    assert tune(client, examples, state)[-1].done
    assert len(server.jobs) == 2


def test_a_server_without_events_is_followed_by_the_jobs_status(server, client, examples, state):
    server.has_events = False
    told = tune(client, examples, state)
    assert [tuning.status for tuning in told][2:] == ["validating_files", "running", "succeeded"]


def test_a_failed_job_is_told_with_its_reason(server, client, examples, state):
    server.script = ["running", "failed"]
    for _ in range(2):
        with pytest.raises(StageError, match=r"job job-0 is failed: the file is bad; delete .*js"):
            tune(client, examples, state)
    assert len(server.jobs) == 1


def test_an_unknown_model_is_told_and_may_then_be_changed(server, client, examples, state):
    config = TuningConfig(model="curie")
    with pytest.raises(ConfigError, match=r"does not fine-tune curie: .*does not exist"):
        tune(client, examples, state, config)
    assert tune(client, examples, state)[-1].done
    assert len(server.jobs) == 1


def test_a_wrong_key_is_told(server, examples, state):
    client = openai.OpenAI(base_url=server.base_url, api_key="sk-wrong", max_retries=0)
    with client, pytest.raises(ConfigError, match=r"refuses the API key: .*Incorrect API key"):
        tune(client, examples, state)
    assert server.files == []


def test_the_state_of_another_job_is_refused(client, examples, state):
    tune(client, examples, state)
    with pytest.raises(ConfigError, match=r"tuning\.json is of a job with other examples"):
        tune(client, examples[1:], state)
    with pytest.raises(ConfigError, match="or another config"):
        tune(client, examples, state, TuningConfig(epochs=3))


def test_a_broken_state_is_named(client, examples, tmp_path):
    for text in ("{", '{"what": 1}', "[]"):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(DatasetError, match=r"state\.json cannot be read"):
            tune(client, examples, tmp_path / "state.json")
    assert read_tuning(tmp_path / "none.json") is None


@pytest.mark.parametrize("changes", [{"model": ""}, {"form": "poem"}, {"epochs": 0}])
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError):
        TuningConfig(**changes)


def test_a_new_state_is_not_done():
    assert not Tuning(digest="d").done
