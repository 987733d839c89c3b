"""The service on a real server, for the tests of this folder; and what they send to it."""

import contextlib
import io
import json
import socket
import threading
import time
from dataclasses import dataclass

import httpx
import numpy as np
import uvicorn
from PIL import Image

from ip2p_ray.engine import EngineConfig
from serve.api import ApiConfig, create_api
from serve.engine_editing import EngineEditing

EDITS = "/v1/images/edits"


@dataclass(frozen=True)
class Service:
    """One that runs, on a port of its own."""

    url: str
    editing: EngineEditing

    @property
    def load(self):
        """How many requests wait, and how many are edited."""
        return self.editing.engine.load

    def wait_for(self, condition, seconds=120.0):
        """Whether the condition of the load comes true."""
        until = time.monotonic() + seconds
        while not (met := condition(*self.load)) and time.monotonic() < until:
            time.sleep(0.005)
        return met

    def is_idle(self):
        return self.wait_for(lambda waiting, running: not waiting and not running)

    def ask(self, image=None, *, files=None, headers=None, **fields):
        """The answer to one request for an edit; of the noise picture if no other is given."""
        fields = {"prompt": "make it night", "steps": "1", "seed": "3"} | fields
        fields = {name: value for name, value in fields.items() if value is not None}
        if files is None:
            files = {"image": PICTURE if image is None else image}
        return httpx.post(self.url + EDITS, data=fields, files=files, headers=headers, timeout=120)

    def connect(self):
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), timeout=120)

    def say(self, *chunks):
        """The answer, status and body, to a request of these very bytes."""
        with self.connect() as line:
            for chunk in chunks:
                line.sendall(chunk)
            return heard(line)


def heard(line):
    """The status, headers and body that come over a line."""
    answer = b""
    while not is_whole(answer):
        chunk = line.recv(65536)
        if not chunk:
            break
        answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers, body


def is_whole(answer):
    head, found, body = answer.partition(b"\r\n\r\n")
    length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(found and length) and len(body) >= int(length[0].split(b":")[1])


@contextlib.contextmanager
def serving(editor, *, host="127.0.0.1", address=None, engine=None, **config):
    """A service, reached by `address`, until the end of the block."""
    editing = EngineEditing(editor, engine or EngineConfig())
    app = create_api(ApiConfig(model="tiny", **config), editing)
    with listening(app, host) as port:
        yield Service(f"http://{address or host}:{port}", editing)
    editing.engine.close(drain=False)


@contextlib.contextmanager
def listening(app, host="127.0.0.1"):
    """The port of a real server with an ASGI application."""
    server = uvicorn.Server(
        uvicorn.Config(app, host=host, port=0, log_level="warning", access_log=False, ws="none")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def multipart(fields, boundary=b"frontier"):
    """The body of (name, value) pairs; a value of bytes is sent as a file."""
    parts = []
    for name, value in fields:
        is_file = isinstance(value, bytes)
        kind = b'; filename="f.png"' if is_file else b""
        head = b'Content-Disposition: form-data; name="' + name.encode() + b'"' + kind
        parts.append(b"--" + boundary + b"\r\n" + head + b"\r\n\r\n")
        parts.append((value if is_file else value.encode()) + b"\r\n")
    return b"".join([*parts, b"--" + boundary + b"--\r\n"])


def head(*headers, path=EDITS, method="POST"):
    """The head of a request with a multipart body."""
    kind = "Content-Type: multipart/form-data; boundary=frontier"
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", kind, *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def problem(answer, status):
    """What an answer of this status says is wrong, in OpenAI's shape."""
    assert answer.status_code == status, answer.text[:300]
    return checked_problem(answer.json())


def checked_problem(body):
    body = json.loads(body) if isinstance(body, bytes) else body
    assert list(body) == ["error"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    for name in ("param", "code"):
        assert error[name] is None or isinstance(error[name], str)
    return error


def noise(width, height, channels=3):
    """uint8 (height, width, channels), or (height, width) of one channel."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, image_format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def opened(data):
    """The picture in an answer's base64, or in bytes, as a uint8 array."""
    import base64

    data = base64.b64decode(data) if isinstance(data, str) else data
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


PICTURE = encoded(Image.fromarray(noise(32, 32)))
"""A PNG of 32 x 32."""
