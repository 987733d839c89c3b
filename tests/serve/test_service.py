"""The service on a real Ray Serve: what only several processes can show."""

import asyncio
import os
import re
import signal
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
import yaml

from ip2p_ray.editor import Editor
from ip2p_ray.miniature import weights
from tests.ports import free_port
from tests.serve.asking import ask, ask_all, picture_bytes, pixels_of

pytestmark = pytest.mark.ray

MARK = "zebra crossing in the fog"
"""An instruction that stands nowhere else."""


@pytest.fixture(scope="module")
def models(tiny_weights, tmp_path_factory):
    """Two folders of editors whose pictures differ."""
    folder = tmp_path_factory.mktemp("models")
    editor = weights.load_editor(tiny_weights)
    editor.save(folder / "first")
    with torch.no_grad():
        editor.model.vae.decoder.conv_out.bias += 0.5
    editor.save(folder / "second")
    return folder


@pytest.fixture(scope="module")
def url(local_ray):
    from ray import serve

    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", 600)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def serving(url, models):
    """Deploys, where it is not deployed so already."""
    deployed = []
    from ray import serve

    from serve import app

    def deploy(model="first", **settings):
        if deployed == [model, settings]:
            return
        usual = {"num_cpus": 0.2, "max_steps": 20_000, "look_back_s": 2, "upscale_delay_s": 0.5}
        usual["deadline_s"] = 900.0
        config = app.ServiceConfig(
            **{**usual, "model": str(models / model), "name": "tiny", **settings}
        )
        serve.run(app.application(config), name="editor", route_prefix="/")
        deployed[:] = [model, settings]

    return deploy


def editor_pids():
    """Of the replicas with an engine."""
    found = []
    # of this Ray alone: others may run on the machine
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::ServeReplica:editor:Editor"):
                found.append(process.pid)
    return found


def wait_until(true, timeout=600, why=""):
    ends = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < ends, f"not after {timeout} s: {why}"
        time.sleep(0.2)


def truth(models, name, seed, steps):
    """What the library makes of the same request."""
    editor = Editor.load(models / name)
    made = editor.edit(picture_bytes(seed), "make it night", seed=seed, steps=steps)
    return np.asarray(made).astype(int)


def test_the_official_client_edits_streams_and_lists(url, serving, models):
    serving()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    made = client.images.edit(
        image=picture_bytes(3),
        prompt="make it night",
        n=2,
        extra_body={"seed": 3, "steps": 4},
    )
    assert [each.model_extra["seed"] for each in made.data] == [3, 4]
    assert np.abs(pixels_of(made.data[0].b64_json) - truth(models, "first", 3, 4)).max() <= 1
    events = list(
        client.images.edit(
            image=picture_bytes(3),
            prompt="make it night",
            stream=True,
            partial_images=2,
            extra_body={"seed": 3, "steps": 4},
        )
    )
    assert [event.type for event in events] == [
        "image_edit.partial_image",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    assert np.abs(pixels_of(events[-1].b64_json) - pixels_of(made.data[0].b64_json)).max() <= 1
    with pytest.raises(openai.BadRequestError, match="cannot be decoded"):
        client.images.edit(image=b"no image", prompt="x")
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_no_log_holds_a_prompt_or_a_picture(url, serving):
    serving()
    answers = asyncio.run(ask_all(url, 2, prompt=MARK, steps=2))
    bad = asyncio.run(ask_all(url, 1, prompt=MARK, image=b"GIF89a broken", steps=2))
    assert [answer.status for answer in (*answers, *bad)] == [200, 200, 400]
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    texts = {path: path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    assert any(b"/v1/images/edits" in text for text in texts.values())
    held = [path.name for path, text in texts.items() if MARK.encode() in text]
    assert held == []
    start = answers[0].body["data"][0]["b64_json"][:60].encode()
    assert [path.name for path, text in texts.items() if start in text] == []


def test_every_metric_of_the_dashboard_is_there(url, serving):
    import ray

    serving()
    asyncio.run(ask_all(url, 3, steps=2))
    asyncio.run(ask_all(url, 1, n=99))
    board = Path(__file__).parents[2] / "cluster" / "grafana" / "editor.json"
    named = set(re.findall(r"\bray_[a-z0-9_]+", board.read_text("utf-8")))
    named = {name for name in named if not name.startswith("ray_node_gram")}  # of machines with GPU
    named -= {"ray_io_cluster"}  # a label
    assert len(named) > 8
    port = ray.nodes()[0]["MetricsExportPort"]

    def missing():
        try:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        except httpx.HTTPError:
            return named
        return named - set(re.findall(r"^(ray_[a-z0-9_]+)\{", text, re.MULTILINE))

    wait_until(lambda: not missing(), why="all metrics are scraped")


def test_beyond_the_queue_429_at_once_and_the_accepted_are_answered(url, serving):
    serving(batch_size=2, max_ongoing=4, max_queued=4)
    answers = asyncio.run(ask_all(url, 30, steps=150))
    accepted = [each for each in answers if each.status == 200]
    refused = [each for each in answers if each.status == 429]
    assert len(accepted) + len(refused) == 30
    assert 4 <= len(accepted) < 30
    for each in refused:
        assert each.body["error"]["code"] == "queue_full"
        assert int(each.headers["retry-after"]) >= 1
    assert asyncio.run(ask_all(url, 1, steps=2))[0].status == 200


@pytest.mark.parametrize("stream", ["false", "true"])
def test_whoever_disconnects_gives_the_place_back(url, serving, stream):
    serving(batch_size=2, max_ongoing=2, max_queued=2)

    async def come_and_go():
        async with httpx.AsyncClient(timeout=900) as client:
            long = []
            await until_answered(client, 429, keep=long, deadline_s=5)
            for each in long:
                each.cancel()
            await asyncio.gather(*long, return_exceptions=True)
            await until_answered(client, 200)

    async def until_answered(client, status, keep=None, **fields):
        ends, seen = time.monotonic() + 120, []
        while status not in seen:
            assert time.monotonic() < ends, seen
            if keep is not None:
                # four of 20,000 steps hold the service for longer than the test waits; one that
                # was refused, because a short one had its place, is asked for again
                keep[:] = [each for each in keep if not each.done()]
                while len(keep) < 4:
                    long = ask(client, url, seed=len(keep), steps=20_000, stream=stream)
                    keep.append(asyncio.create_task(long))
            await asyncio.sleep(0.1)
            seen.append((await ask(client, url, seed=9, steps=2, **fields)).status)

    asyncio.run(come_and_go())


def test_a_deadline_ends_a_request_and_frees_its_place(url, serving):
    serving(batch_size=1, max_ongoing=1, max_queued=4)
    late, after = asyncio.run(_late_then_quick(url))
    assert late.status == 408
    assert late.headers["x-should-retry"] == "false"
    assert after.status == 200


async def _late_then_quick(url):
    async with httpx.AsyncClient(timeout=900) as client:
        late = await ask(client, url, steps=5000, deadline_s=0.5)
        return late, await ask(client, url, steps=2)


def test_a_replica_killed_under_load_loses_and_doubles_no_request(url, serving, models):
    serving(batch_size=4, max_queued=100, min_replicas=2, max_replicas=2)
    wait_until(lambda: len(editor_pids()) == 2, why="two replicas")
    victim = editor_pids()[0]
    answers = asyncio.run(_killed_under_load(url, victim))
    assert len(answers) == 32
    for answer in answers:
        assert answer.status in (200, 503), answer.body
        if answer.status == 503:
            assert int(answer.headers["retry-after"]) >= 1
    done = {a.body["data"][0]["seed"]: a for a in answers if a.status == 200}
    assert len(done) > 8
    for seed in (0, 13, 31):
        if seed in done:
            made = pixels_of(done[seed].body["data"][0]["b64_json"])
            assert np.abs(made - truth(models, "first", seed, 150)).max() <= 1
    wait_until(lambda: len(set(editor_pids()) - {victim}) == 2, why="the replica is replaced")


def test_other_weights_take_over_without_a_failed_request(url, serving, models):
    serving(batch_size=4, max_queued=100)
    with under_load(url) as statuses:
        wait_until(lambda: len(statuses) > 10, why="load")
        _reconfigure(models / "second")
        assert np.abs(made_of(url, seed=5) - truth(models, "second", 5, 8)).max() <= 1
        _reconfigure(models / "nothing")  # cannot be loaded: what works is kept
        assert np.abs(made_of(url, seed=6) - truth(models, "second", 6, 8)).max() <= 1
        before = len(statuses)
        wait_until(lambda: len(statuses) > before + 10, why="load goes on")
    assert set(statuses) == {200}


def test_a_deployment_with_other_weights_fails_no_request_either(url, serving, models):
    serving(batch_size=4, max_queued=100)
    with under_load(url) as statuses:
        wait_until(lambda: len(statuses) > 10, why="load")
        serving("second", batch_size=4, max_queued=100)
        assert np.abs(made_of(url, seed=5) - truth(models, "second", 5, 8)).max() <= 1
    assert set(statuses) == {200}


async def _killed_under_load(url, victim):
    """The answers to 32 requests, of which more than half were open when the victim was killed."""
    async with httpx.AsyncClient(timeout=900, limits=httpx.Limits(max_connections=None)) as client:
        asked = [asyncio.create_task(ask(client, url, seed=seed, steps=150)) for seed in range(32)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert sum(not each.done() for each in asked) > 16
        os.kill(victim, signal.SIGKILL)
        return await asyncio.gather(*asked)


def _reconfigure(model):
    """What Serve calls where only the user_config of a deployment has changed."""
    from ray import serve

    handle = serve.get_deployment_handle("Editor", "editor")
    handle.reconfigure.remote({"model": str(model)}).result(timeout_s=300)


@contextmanager
def under_load(url):
    """The statuses of requests that go on for as long as the block."""
    statuses, stop = [], threading.Event()

    async def load():
        async with httpx.AsyncClient(timeout=900) as client:
            while not stop.is_set():
                answers = await asyncio.gather(*(ask(client, url, seed=s, steps=8) for s in (1, 2)))
                statuses.extend(answer.status for answer in answers)

    loader = threading.Thread(target=lambda: asyncio.run(load()))
    loader.start()
    try:
        yield statuses
    finally:
        stop.set()
        loader.join()


def made_of(url, seed):
    """The picture of one more request."""

    async def one():
        async with httpx.AsyncClient(timeout=900) as client:
            return await ask(client, url, seed=seed, steps=8)

    answer = asyncio.run(one())
    assert answer.status == 200, answer.body
    return pixels_of(answer.body["data"][0]["b64_json"])


def test_replicas_come_with_requests_and_go_to_none(url, serving):
    serving(
        batch_size=1,
        min_replicas=0,
        max_replicas=2,
        max_queued=100,
        target_ongoing=1,
        downscale_delay_s=1,
    )
    wait_until(lambda: not editor_pids(), why="no replica without requests")
    assert httpx.get(f"{url}/readyz").status_code == 200
    with under_load(url) as statuses:
        wait_until(lambda: len(editor_pids()) == 2, why="two replicas under load")
    assert set(statuses) == {200}
    wait_until(lambda: not editor_pids(), why="no replica again")


def test_the_config_is_one_that_serve_takes():
    from ray.serve.schema import ServeDeploySchema

    from serve import app

    text = Path(app.__file__).with_name("config.yaml").read_text("utf-8")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    named = {each.route_prefix: each for each in schema.applications}
    assert named["/"].import_path == "serve.app:build"
    app.ServiceConfig.model_validate(named["/"].args)
