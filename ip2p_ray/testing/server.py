"""A server of the OpenAI API that goes wrong on purpose, and counts what it was paid for.

It speaks HTTP on 127.0.0.1: models, chat completions, completions and moderations. Its edit of a
caption depends on the caption alone. Which fault strikes a request is drawn from the seed, the
caption and how often it was asked for; whether the answer is empty, a refusal or of a wrong form
from the seed and the caption. So what comes of a caption in the end does not depend on the order
of the requests, nor on how many were needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.request import Request, urlopen

from ip2p_ray.errors import ConfigError
from ip2p_ray.schema import stream_seed
from ip2p_ray.triplets.prompt import CAPTION_END, INSTRUCTION_END, STOP, chat_reply


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Rates in [0, 1]. The first five strike a request, the others are what a caption gets."""

    too_many: float = 0.0
    """429 with Retry-After."""
    error: float = 0.0
    """500."""
    slow: float = 0.0
    """`Behaviour.slow_s` later than the others, and then right."""
    hang_up: float = 0.0
    """The connection ends in the middle of the reply."""
    malformed: float = 0.0
    """200 with a body that is no JSON."""
    empty: float = 0.0
    """A reply of no text."""
    refusal: float = 0.0
    """A refusal."""
    wrong_schema: float = 0.0
    """JSON with other names than those that were asked for."""

    def __post_init__(self) -> None:
        for names in (_STRIKES, _ANSWERS):
            rates = [getattr(self, name) for name in names]
            if min(rates) < 0.0 or sum(rates) > 1.0:
                raise ConfigError(f"rates are at least 0 and together at most 1, got {self}")

    @classmethod
    def evenly(cls, rate: float) -> Faults:
        """Every kind equally often, together in `rate` of the requests."""
        return cls(**dict.fromkeys((*_STRIKES, *_ANSWERS), rate / 8))


_STRIKES = ("too_many", "error", "slow", "hang_up", "malformed")
_ANSWERS = ("empty", "refusal", "wrong_schema")


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How a server behaves."""

    seed: int = 0
    """Of all draws."""
    faults: Faults = field(default_factory=Faults)
    """What goes wrong, and how often."""
    delay_s: float = 0.0
    """Seconds that every reply takes."""
    slow_s: float = 1.0
    """Seconds that a slow one takes in addition."""
    retry_after_s: float = 0.05
    """What a 429 asks to wait; sent as retry-after-ms too where it is not whole."""
    models: tuple[str, ...] = ("fake",)
    """Names that it answers to."""
    unlisted: tuple[str, ...] = ()
    """Names that it answers to and does not list."""
    lists_models: bool = True
    """Whether it has GET /models."""
    models_status: int = 404
    """What it answers there if not."""
    moderates: bool = True
    """Whether it has POST /moderations; 404 otherwise."""
    api_key: str | None = None
    """The key that requests have to bear; None takes any."""
    structured: bool = True
    """Whether it takes `response_format`; 400 otherwise."""
    max_tokens: bool = True
    """Whether it takes `max_tokens`; 400 otherwise, as of models that reason."""
    counts_tokens: bool = True
    """Whether replies have `usage`."""
    quota: bool = True
    """Whether the account has any left; 429 of another code otherwise."""
    flagged: tuple[str, ...] = ()
    """Words that its moderation flags."""
    filtered: tuple[str, ...] = ()
    """Words in captions that its filter keeps from the model; 400."""
    refused: tuple[str, ...] = ()
    """Words in captions that it refuses for no stated reason; 400."""
    denied: tuple[tuple[str, int], ...] = ()
    """Words in captions that it answers with another status, and which."""
    text: str | None = None
    """The text of every reply; None for an edit."""
    usage: str | None = None
    """JSON of what every reply has for `usage`; None for a count."""


@dataclass(kw_only=True)
class Counts:
    """What happened so far."""

    requests: Counter[str] = field(default_factory=Counter)
    """By path."""
    faults: Counter[str] = field(default_factory=Counter)
    """By kind."""
    paid: Counter[str] = field(default_factory=Counter)
    """Whole replies that went out, by caption, the strange ones included."""
    paid_at: Counter[str] = field(default_factory=Counter)
    """The same by the tenth of a second, of the machine's monotonic clock, in which they went."""
    abandoned: Counter[str] = field(default_factory=Counter)
    """Replies whose reader had gone, by caption."""
    in_flight: int = 0
    """Requests that are open."""
    most_in_flight: int = 0
    """Requests that were open at the same time."""

    @classmethod
    def of(cls, url: str, key: str = "") -> Counts:
        """Of a server in another process, by its `base_url`."""
        headers = {"authorization": f"Bearer {key}"}
        with urlopen(Request(url.removesuffix("/v1") + "/counts", headers=headers)) as answer:
            found = json.load(answer)
        counts = cls()
        for name, value in found.items():
            setattr(counts, name, Counter(value) if isinstance(value, dict) else value)
        return counts


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass(frozen=True)
class _Response:
    status: int
    body: dict[str, Any]
    headers: tuple[tuple[str, str], ...] = ()


class FaultyServer:
    """Runs in a thread of its own from `with` to its end."""

    def __init__(self, behaviour: Behaviour | None = None, *, port: int = 0) -> None:
        self.behaviour = behaviour or Behaviour()
        """How it behaves; may be replaced while it runs."""
        self.counts = Counts()
        """What happened so far."""
        self.received: deque[dict[str, Any]] = deque(maxlen=1000)
        """Bodies of the last requests about captions."""
        self.url = ""
        """For `base_url`, as soon as it runs."""
        self._port = port
        self._asked: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end = asyncio.Event()
        self._running = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FaultyServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)
        self._thread.start()
        self._running.wait()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def serve(self) -> None:
        """Answers in the calling thread, until it is cancelled."""
        self._loop = asyncio.get_running_loop()
        connections: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._connection(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", self._port, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._running.set()
        await self._end.wait()
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        counts = self.counts
        try:
            while not writer.is_closing():
                request = await _read(reader)
                counts.in_flight += 1
                counts.most_in_flight = max(counts.most_in_flight, counts.in_flight)
                try:
                    await self._answer(request, reader, writer)
                finally:
                    counts.in_flight -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _answer(
        self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.counts.requests[request.path] += 1
        caption = _caption(request)
        if caption is not None:
            self.received.append(request.body)
        refused = self._refused(request, caption)
        if refused is not None or caption is None:
            await _send(writer, refused or self._free(request))
            return
        self._asked[caption] += 1
        fault = self._drawn(_STRIKES, "strike", caption, self._asked[caption])
        if fault is not None:
            self.counts.faults[fault] += 1
        if fault == "too_many":
            await _send(writer, self._too_many())
            return
        if fault == "error":
            await _send(writer, _error(500, "The server had an error"))
            return
        slow_s = self.behaviour.slow_s if fault == "slow" else 0.0
        await asyncio.sleep(self.behaviour.delay_s + slow_s)
        if reader.at_eof():
            self.counts.abandoned[caption] += 1
            writer.close()
        elif fault == "malformed":
            await _send(writer, _Response(200, {}), content=b'{"id": "fake", "choices": [{"mess')
        elif fault == "hang_up":
            await _send(writer, self._reply(request, caption), cut=True)
        else:
            self.counts.paid[caption] += 1
            try:
                await _send(writer, self._reply(request, caption))
            except ConnectionError:
                self.counts.paid[caption] -= 1
                self.counts.abandoned[caption] += 1
                raise
            self.counts.paid_at[f"{time.monotonic():.1f}"] += 1

    def _refused(self, request: _Request, caption: str | None) -> _Response | None:
        """Why a request is not even looked at."""
        behaviour, body = self.behaviour, request.body
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if behaviour.api_key is not None and key != behaviour.api_key:
            return _error(401, f"Incorrect API key provided: {key}", code="invalid_api_key")
        if caption is None:
            return None
        if body["model"] not in (*behaviour.models, *behaviour.unlisted):
            text = f"The model `{body['model']}` does not exist"
            return _error(404, text, code="model_not_found")
        if "response_format" in body and not behaviour.structured:
            return _error(400, "response_format is not supported", param="response_format")
        if "max_tokens" in body and not behaviour.max_tokens:
            text = "Unsupported parameter: use 'max_completion_tokens' instead of 'max_tokens'"
            return _error(400, text, param="max_tokens")
        if not behaviour.quota:
            return _error(429, "You exceeded your current quota", code="insufficient_quota")
        if any(word in caption for word in behaviour.filtered):
            return _error(400, "The prompt was filtered", code="content_filter")
        if any(word in caption for word in behaviour.refused):
            return _error(400, "Invalid prompt")
        for word, status in behaviour.denied:
            if word in caption:
                return _error(status, f"{HTTPStatus(status).phrase}, said the server")
        return None

    def _free(self, request: _Request) -> _Response:
        """The answer to whatever is not paid for."""
        if request.path == "/v1/moderations" and self.behaviour.moderates:
            return self._moderation(request.body)
        if request.path == "/counts":
            return _Response(200, vars(self.counts))
        if request.path.startswith("/v1/models"):
            if not self.behaviour.lists_models:
                return _error(self.behaviour.models_status, "There is no list")
            listed = [{"id": name, "object": "model"} for name in self.behaviour.models]
            return _Response(200, {"object": "list", "data": listed})
        return _error(404, f"Invalid URL ({request.method} {request.path})")

    def _moderation(self, body: dict[str, Any]) -> _Response:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        results = [
            {"flagged": any(word in text for word in self.behaviour.flagged)} for text in texts
        ]
        return _Response(200, {"id": "fake", "model": "fake", "results": results})

    def _too_many(self) -> _Response:
        seconds = self.behaviour.retry_after_s
        headers = [("retry-after", f"{seconds:.0f}")]
        if seconds != int(seconds):
            headers.append(("retry-after-ms", f"{seconds * 1000:.0f}"))
        refused = _error(429, "Rate limit reached", code="rate_limit_exceeded")
        return _Response(429, refused.body, tuple(headers))

    def _reply(self, request: _Request, caption: str) -> _Response:
        instruction, edited_caption = edit(caption)
        kind = self._drawn(_ANSWERS, "answer", caption)
        if kind is not None:
            self.counts.faults[kind] += 1
        chat = request.path == "/v1/chat/completions"
        if self.behaviour.text is not None:
            text = self.behaviour.text
        elif kind == "empty":
            text = ""
        elif kind == "refusal":
            text = "I'm sorry, but I can't help with that."
        elif kind == "wrong_schema":
            text = json.dumps({"edit": instruction, "output": edited_caption})
        elif chat:
            text = chat_reply(instruction, edited_caption)
        else:
            text = instruction + INSTRUCTION_END + edited_caption
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if chat:
            refusal = text if kind == "refusal" and "response_format" in request.body else None
            content = None if refusal else text
            choice["message"] = {"role": "assistant", "content": content, "refusal": refusal}
        else:
            stopped = STOP in (request.body.get("stop") or ())
            choice["text"] = text if stopped else text + STOP
        read = len(json.dumps(request.body)) // 4
        wrote = len(text) // 4 + 1
        counted = {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
        usage = counted if self.behaviour.usage is None else json.loads(self.behaviour.usage)
        body = {
            "id": "fake",
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": request.body["model"],
            "choices": [choice],
            "usage": usage if self.behaviour.counts_tokens else None,
        }
        return _Response(200, body)

    def _drawn(self, names: tuple[str, ...], *stream: int | str) -> str | None:
        draw = stream_seed(self.behaviour.seed, *stream) / 2**63
        for name in names:
            draw -= getattr(self.behaviour.faults, name)
            if draw < 0.0:
                return name
        return None


@contextlib.contextmanager
def faulty_process(*flags: str) -> Iterator[str]:
    """The `base_url` of a server in a process of its own, `python -m ip2p_ray.testing <flags>`."""
    command = [sys.executable, "-m", "ip2p_ray.testing", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def edit(caption: str) -> tuple[str, str]:
    """The instruction and the edited caption with which the server answers a caption."""
    manners = ("in the snow", "at night", "as a watercolour", "in the rain", "made of wood")
    manner = manners[stream_seed("manner", caption) % len(manners)]
    return f"make it {manner}", f"{caption.rstrip('.')} {manner}"


def _caption(request: _Request) -> str | None:
    """What has to be edited; None if nothing has."""
    if request.method != "POST":
        return None
    if request.path == "/v1/chat/completions":
        return str(request.body["messages"][-1]["content"])
    if request.path == "/v1/completions":
        return str(request.body["prompt"]).removesuffix(CAPTION_END)
    return None


def _error(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> _Response:
    error = {"message": message, "type": "fake_error", "code": code, "param": param}
    return _Response(status, {"error": error})


async def _read(reader: asyncio.StreamReader) -> _Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    method, path, _ = first.split(" ")
    headers = {}
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    return _Request(method, path, headers, json.loads(content) if content else {})


async def _send(
    writer: asyncio.StreamWriter,
    response: _Response,
    *,
    content: bytes | None = None,
    cut: bool = False,
) -> None:
    """Sends a response, or another content with it, or its first half and then nothing more."""
    content = json.dumps(response.body).encode() if content is None else content
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(content)}",
        *(f"{name}: {value}" for name, value in response.headers),
    ]
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    writer.write(head + (content[: len(content) // 2] if cut else content))
    await writer.drain()
    if cut:
        writer.close()
