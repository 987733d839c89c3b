"""A server that speaks S3 as a process of its own, and what goes wrong on the way to it.

The server is moto's. `FaultyWay` stands between it and a client: it answers 503 SlowDown in its
place, hangs up before or in the middle of the answer, or passes the request on.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from ip2p_ray.errors import ConfigError
from ip2p_ray.schema import stream_seed

_SERVE = """
import sys
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
bucket, keys = sys.argv[1], int(sys.argv[2])
if bucket:
    store = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    store.create_bucket(bucket, "us-east-1")
    for number in range(keys):
        store.put_object(bucket, "folder/%06d" % number, b"")
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""

_ERROR = "<Error><Code>{}</Code><Message>as it was told</Message></Error>"


@contextlib.contextmanager
def bucket_process(*, bucket: str = "", keys: int = 0) -> Iterator[str]:
    """The endpoint of a server; it ends with the block, or with this process.

    It has no bucket, or that of the name with so many empty objects folder/000000 and so on.
    """
    command = [sys.executable, "-c", _SERVE, bucket, str(keys)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@dataclass(frozen=True, kw_only=True)
class WayFaults:
    """Rates in [0, 1] at which a request goes wrong; together at most 1."""

    slow_down: float = 0.0
    """503, of which the server hears nothing."""
    hang_up: float = 0.0
    """The connection ends before there is an answer; the server hears nothing."""
    lost: float = 0.0
    """The connection ends when the server has answered; the answer is lost."""
    cut: float = 0.0
    """The connection ends in the middle of the answer."""
    refusal: tuple[int, str] | None = None
    """Status and code with which every request is refused that nothing else strikes."""
    pause_s: float = 0.0
    """So much later each answer comes that does come."""
    methods: tuple[str, ...] = ("DELETE", "GET", "HEAD", "POST", "PUT")
    """Requests of others are passed on."""

    def __post_init__(self) -> None:
        rates = [getattr(self, name) for name in _KINDS]
        if min(rates) < 0.0 or sum(rates) > 1.0:
            raise ConfigError(f"rates are at least 0 and together at most 1, got {self}")


_KINDS = ("slow_down", "hang_up", "lost", "cut")


class FaultyWay:
    """A way to a server; runs in a thread of its own from `with` to its end."""

    def __init__(self, endpoint: str, faults: WayFaults | None = None, *, seed: int = 0) -> None:
        self.faults = faults or WayFaults()
        """What goes wrong, and how often; may be replaced while it runs."""
        self.counts: Counter[str] = Counter()
        """Faults by kind, and requests by method."""
        self.url = ""
        """The endpoint at its end, as soon as it runs."""
        self._host, self._port = urlsplit(endpoint).hostname, urlsplit(endpoint).port
        self._seed = seed
        self._drawn = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end = asyncio.Event()
        self._running = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FaultyWay:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self._running.wait()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        connections: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._connection(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._running.set()
        await self._end.wait()
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._pass_on(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # one of the two has gone
        finally:
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request; each has a connection of its own."""
        head = await reader.readuntil(b"\r\n\r\n")
        method = head.split(b" ", 1)[0].decode()
        if b"100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _body(head, reader)
        fault = self._fault(method)
        self.counts[method] += 1
        if fault is not None:
            self.counts[fault] += 1
        if fault == "hang_up":
            return
        struck = method in self.faults.methods
        refusal = (503, "SlowDown") if fault == "slow_down" else self.faults.refusal
        if refusal is not None and struck:
            writer.write(_refused(method, *refusal))
            await writer.drain()
            return
        answer = await self._answer(head, body)
        if fault == "lost":
            return
        if struck:
            await asyncio.sleep(self.faults.pause_s)
        start = answer.index(b"\r\n\r\n") + 4
        whole = (start + len(answer)) // 2 if fault == "cut" else len(answer)
        writer.write(answer[:whole])
        await writer.drain()

    async def _answer(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            first, *lines = head.rstrip(b"\r\n").split(b"\r\n")
            kept = [line for line in lines if _name(line) not in (b"connection", b"expect")]
            writer.write(b"\r\n".join([first, *kept, b"connection: close", b"", b""]) + body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()

    def _fault(self, method: str) -> str | None:
        if method not in self.faults.methods:
            return None
        self._drawn += 1
        draw = stream_seed(self._seed, "way", self._drawn) / 2**63
        for kind in _KINDS:
            draw -= getattr(self.faults, kind)
            if draw < 0.0:
                return kind
        return None


async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    """The body as it is sent, in chunks or of a stated length."""
    told = {_name(line): line.partition(b":")[2].strip() for line in head.split(b"\r\n")[1:]}
    if told.get(b"transfer-encoding", b"").lower() != b"chunked":
        return await reader.readexactly(int(told.get(b"content-length", 0)))
    chunks: list[bytes] = []
    while not chunks or chunks[-1] != b"0\r\n\r\n":
        line = await reader.readuntil(b"\r\n")
        chunks.append(line + await reader.readexactly(int(line.split(b";")[0], 16) + 2))
    return b"".join(chunks)


def _refused(method: str, status: int, code: str) -> bytes:
    content = "" if method == "HEAD" else _ERROR.format(code)
    lines = [f"HTTP/1.1 {status} {code}", "connection: close", "content-type: application/xml"]
    lines += [f"content-length: {len(content)}", "", content]
    return "\r\n".join(lines).encode()


def _name(line: bytes) -> bytes:
    return line.partition(b":")[0].strip().lower()
