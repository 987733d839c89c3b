"""An editing service without a model: it speaks the API, and goes wrong when it is told to.

Its edit is the negative of the picture, so what comes back can be told from what was sent.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from PIL import Image, ImageOps
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ip2p_ray.errors import ImageError
from ip2p_ray.images import decode_image, encode_png

_SCALES = {"text_guidance_scale": 2.0, "image_guidance_scale": 1.5}


@dataclass(frozen=True, kw_only=True)
class ServiceBehaviour:
    """How a service behaves."""

    api_key: str | None = None
    """The key that requests have to bear; None takes any."""
    steps: int = 4
    """Steps of a request that states none."""
    step_s: float = 0.0
    """Seconds that each takes."""
    full: int = 0
    """Requests for edits that are answered 429 before one is taken."""
    retry_after_s: float = 3.0
    """What those answers ask to wait; as a fraction sent as retry-after-ms too."""
    breaks_at: int | None = None
    """A step at which a stream ends in an error; None for never."""
    fails: int = 0
    """Requests for edits that are answered 500, after those of `full`."""
    models_after: threading.Event | None = None
    """The list of models comes once it is set."""
    defaults: dict[str, float] | None = None
    """Settings that it names as the model's own."""


class FakeService:
    """Runs in a thread of its own from `with` to its end."""

    def __init__(self, behaviour: ServiceBehaviour | None = None) -> None:
        self.behaviour = behaviour or ServiceBehaviour()
        self.received: deque[dict[str, Any]] = deque(maxlen=1000)
        """Fields of the last requests for edits, files as bytes."""
        self.edits = 0
        """Edits that were begun."""
        self.in_flight = 0
        """Edits that are in work."""
        self.most_in_flight = 0
        """Edits that were in work at the same time."""
        self.url = ""
        """As soon as it runs."""
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/images/edits", self._edit, methods=["POST"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), port=0, log_level="warning", lifespan="off", ws="none"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    @property
    def behaviour(self) -> ServiceBehaviour:
        """How it behaves; may be replaced while it runs, and then counts from the start."""
        return self._behaviour

    @behaviour.setter
    def behaviour(self, behaviour: ServiceBehaviour) -> None:
        self._behaviour, self._refused = behaviour, 0

    def __enter__(self) -> FakeService:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _denied(self, request: Request) -> Response | None:
        key, given = self.behaviour.api_key, request.headers.get("authorization")
        if key is None or given == f"Bearer {key}":
            return None
        said = "no API key was sent" if given is None else "the API key is wrong"
        return _error(401, said, code="invalid_api_key")

    async def _models(self, request: Request) -> Response:
        behaviour = self.behaviour
        while behaviour.models_after is not None and not behaviour.models_after.is_set():
            await asyncio.sleep(0.05)
        entry: dict[str, Any] = {"id": "negative", "object": "model", "created": 0}
        entry["owned_by"] = "ip2p_ray"
        if behaviour.defaults is not None:
            entry["defaults"] = behaviour.defaults
        return self._denied(request) or JSONResponse({"object": "list", "data": [entry]})

    async def _edit(self, request: Request) -> Response:
        denied = self._denied(request)
        if denied is not None:
            return denied
        async with request.form() as form:
            fields: dict[str, Any] = {
                name: await value.read() if isinstance(value, UploadFile) else value
                for name, value in form.items()
            }
        self.received.append(fields)
        behaviour = self.behaviour
        if self._refused < behaviour.full + behaviour.fails:
            self._refused += 1
            if self._refused > behaviour.full:
                return _error(500, "the model broke")
            seconds = behaviour.retry_after_s
            headers = {
                "retry-after": str(max(round(seconds), 1)),
                "retry-after-ms": str(seconds * 1000),
            }
            return _error(429, "the queue is full", code="queue_full", headers=headers)
        try:
            picture = decode_image(fields["image"])
        except ImageError as error:
            return _error(400, str(error), param="image")
        said = {
            "steps": int(fields.get("steps", behaviour.steps)),
            **{name: float(fields.get(name, value)) for name, value in _SCALES.items()},
        }
        seed = int(fields.get("seed", 17))
        self.edits += 1
        events = self._events(picture, said, seed, int(fields.get("partial_images", 0)))
        if fields.get("stream") == "true":
            return StreamingResponse(_sse(events), media_type="text/event-stream")
        last = [event async for event in events][-1]
        data = [{"b64_json": last["b64_json"], "seed": seed}]
        return JSONResponse({"created": 0, "data": data, "output_format": "png", **said})

    async def _events(
        self, picture: Image.Image, said: dict[str, Any], seed: int, previews: int
    ) -> AsyncIterator[dict[str, Any]]:
        """What a stream sends; the last one is the edited picture."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            negative, steps, index = ImageOps.invert(picture), said["steps"], 0
            common = {
                "created_at": 0,
                "size": f"{picture.width}x{picture.height}",
                "output_format": "png",
                "quality": "auto",
                "background": "opaque",
            }
            for step in range(1, steps + 1):
                await asyncio.sleep(self.behaviour.step_s)
                if step == self.behaviour.breaks_at:
                    yield {"error": {"message": "the model broke", "type": "server_error"}}
                    return
                if index < step * previews // steps and step < steps:
                    shown = Image.blend(picture, negative, step / steps)
                    numbers = {"partial_image_index": index, "step": step, "steps": steps}
                    kind = {"type": "image_edit.partial_image"}
                    yield {**kind, "b64_json": _encoded(shown), **numbers, **common}
                    index += 1
            usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
            details = {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
            kind = {"type": "image_edit.completed", "b64_json": _encoded(negative)}
            yield {**kind, **common, "usage": {**usage, **details}, "seed": seed, **said}
        finally:
            self.in_flight -= 1


async def _sse(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    async for event in events:
        yield f"event: {event.get('type', 'error')}\ndata: {json.dumps(event)}\n\n"


def _encoded(picture: Image.Image) -> str:
    return base64.b64encode(encode_png(picture)).decode()


def _error(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": body}, status, headers)
