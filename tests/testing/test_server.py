"""The faulty server: what it answers, what goes wrong, and that it counts right."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from http.client import HTTPConnection, IncompleteRead
from urllib.parse import urlsplit

import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.testing import Behaviour, Counts, Faults, FaultyServer, edit, faulty_process
from ip2p_ray.triplets.prompt import chat_reply, completion_prompt


class Client:
    """One connection, kept open from request to request unless it breaks."""

    def __init__(self, url, key="key"):
        self._connection = HTTPConnection(urlsplit(url).netloc)
        self._key = key

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._connection.close()

    def ask(self, path, body=None):
        headers = {"authorization": f"Bearer {self._key}"}
        method = "GET" if body is None else "POST"
        self._connection.request(method, path, body and json.dumps(body), headers)
        response = self._connection.getresponse()
        return response, response.read()

    def chat(self, caption, **fields):
        messages = [{"role": "user", "content": caption}]
        return self.ask("/v1/chat/completions", {"model": "fake", "messages": messages, **fields})

    def content(self, caption, **fields):
        _, body = self.chat(caption, **fields)
        return json.loads(body)["choices"][0]["message"]["content"]


def test_it_answers_like_the_real_thing():
    with FaultyServer() as server, Client(server.url) as client:
        response, body = client.chat("a cat")
        assert response.status == 200
        answer = json.loads(body)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["message"]["content"] == chat_reply(*edit("a cat"))
        assert answer["usage"]["total_tokens"] > 0
        prompt = {"model": "fake", "prompt": completion_prompt("a dog")}
        whole = "\n%%\n".join(edit("a dog"))
        for stop, text in ((["\nEND"], whole), (None, whole + "\nEND")):
            _, body = client.ask("/v1/completions", {**prompt, "stop": stop})
            assert json.loads(body)["choices"][0]["text"] == text
        _, body = client.ask("/v1/models")
        assert [model["id"] for model in json.loads(body)["data"]] == ["fake"]
        assert server.counts.paid == Counter({"a cat": 1, "a dog": 2})
        assert server.counts.requests["/v1/completions"] == 2


def test_it_refuses_what_it_does_not_take_and_that_is_not_paid():
    behaviour = Behaviour(api_key="secret", structured=False, max_tokens=False, lists_models=False)
    with FaultyServer(behaviour) as server:
        with Client(server.url, key="wrong") as client:
            assert client.chat("a cat")[0].status == 401
        with Client(server.url, key="secret") as client:
            assert client.ask("/v1/models")[0].status == 404
            assert client.chat("a cat", model="other")[0].status == 404
            assert client.chat("a cat", response_format={})[0].status == 400
            assert client.chat("a cat", max_tokens=5)[0].status == 400
            assert client.ask("/v1/nothing")[0].status == 404
            assert server.counts.paid == Counter()
            assert client.chat("a cat", max_completion_tokens=5)[0].status == 200


def test_moderation_flags_words():
    with FaultyServer(Behaviour(flagged=("bad",))) as server, Client(server.url) as client:
        _, body = client.ask("/v1/moderations", {"input": ["a bad cat", "a cat"]})
        assert [result["flagged"] for result in json.loads(body)["results"]] == [True, False]


def test_faults_of_requests():
    with FaultyServer(Behaviour(faults=Faults(too_many=1.0))) as server:
        with Client(server.url) as client:
            response, _ = client.chat("a cat")
            assert response.status == 429
            assert response.headers["retry-after"] == "0"
            assert response.headers["retry-after-ms"] == "50"
            server.behaviour = Behaviour(faults=Faults(too_many=1.0), retry_after_s=3)
            response, _ = client.chat("a cat")
            assert response.headers["retry-after"] == "3"
            assert "retry-after-ms" not in response.headers
            server.behaviour = Behaviour(faults=Faults(error=1.0))
            assert client.chat("a cat")[0].status == 500
            server.behaviour = Behaviour(faults=Faults(malformed=1.0))
            with pytest.raises(json.JSONDecodeError):
                client.content("a cat")
            server.behaviour = Behaviour(faults=Faults(hang_up=1.0))
            with pytest.raises(IncompleteRead):
                client.chat("a cat")
        assert server.counts.paid == Counter()
        assert server.counts.faults == {"too_many": 2, "error": 1, "malformed": 1, "hang_up": 1}


def test_faults_of_answers_are_paid():
    with FaultyServer(Behaviour(faults=Faults(empty=1.0))) as server, Client(server.url) as client:
        assert client.content("a cat") == ""
        server.behaviour = Behaviour(faults=Faults(refusal=1.0))
        assert client.content("a cat").startswith("I'm sorry")
        assert client.content("a cat", response_format={"type": "json_schema"}) is None
        server.behaviour = Behaviour(faults=Faults(wrong_schema=1.0))
        assert set(json.loads(client.content("a cat"))) == {"edit", "output"}
        assert server.counts.paid == {"a cat": 4}


def test_faults_have_their_rates_and_follow_the_seed():
    def outcomes(seed):
        behaviour = Behaviour(seed=seed, faults=Faults.evenly(0.4), slow_s=0.0)
        found = []
        with FaultyServer(behaviour) as server:
            for n in range(300):
                with Client(server.url) as client:
                    try:
                        found.append(client.chat(f"a cat {n}")[1])
                    except IncompleteRead:
                        found.append(None)
        return found, server.counts.faults

    found, faults = outcomes(1)
    assert outcomes(1) == (found, faults)
    assert outcomes(2)[0] != found
    assert len(faults) == 8
    assert all(3 <= count <= 30 for count in faults.values())  # 15 each are expected


def test_an_answer_does_not_depend_on_how_often_it_was_asked_for():
    behaviour = Behaviour(faults=Faults(error=0.3, empty=0.2, refusal=0.2, wrong_schema=0.2))
    with FaultyServer(behaviour) as server, Client(server.url) as client:
        for n in range(10):
            replies = [client.chat(f"a cat {n}") for _ in range(6)]
            assert len({body for response, body in replies if response.status == 200}) <= 1


def test_a_reply_that_nobody_waits_for_is_not_paid():
    with FaultyServer(Behaviour(delay_s=2.0)) as server:
        with Client(server.url) as client:
            body = {"model": "fake", "messages": [{"content": "a cat"}]}
            client._connection.request("POST", "/v1/chat/completions", json.dumps(body))
        with Client(server.url) as client:
            client.chat("a dog")
        assert server.counts.paid == {"a dog": 1}
        assert server.counts.abandoned == {"a cat": 1}


@pytest.mark.parametrize("rates", [{"error": -0.1}, {"error": 0.6, "slow": 0.6}, {"empty": 1.1}])
def test_rates_are_shares(rates):
    with pytest.raises(ConfigError, match="together at most 1"):
        Faults(**rates)


def test_it_runs_as_a_process_too():
    with faulty_process("--fault-rate", "0", "--api-key", "secret") as url:
        with Client(url, key="secret") as client:
            assert client.content("a cat") == chat_reply(*edit("a cat"))
        counts = Counts.of(url, key="secret")
    assert counts.paid == {"a cat": 1}
    assert counts.most_in_flight == 1


def test_it_needs_neither_torch_nor_ray():
    script = (
        "import sys; import ip2p_ray.testing.server, ip2p_ray.triplets.writer;"
        "from ip2p_ray.testing import FaultyServer, Behaviour;"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_names_that_it_lacks_are_attribute_errors():
    import ip2p_ray.testing

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ip2p_ray.testing.nothing  # noqa: B018


async def _burst(url, requests, in_flight):
    """Replies to raw requests over kept connections; the client is as cheap as can be."""
    host, port = urlsplit(url).netloc.split(":")
    body = json.dumps({"model": "fake", "messages": [{"content": "a cat"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    async def one(count):
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in range(count):
            writer.write(head + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(answer.split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(one(requests // in_flight) for _ in range(in_flight)))


def test_it_serves_many_at_once():
    with FaultyServer(Behaviour(delay_s=0.1)) as server:
        asyncio.run(_burst(server.url, 320, 64))
        assert server.counts.most_in_flight == 64
        assert server.counts.paid == {"a cat": 320}
