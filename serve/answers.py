"""What the API answers, and how /docs describes it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from typing import Any

from serve.form import Asked
from serve.orders import Edited


def whole(asked: Asked, made: Sequence[Edited]) -> dict[str, Any]:
    """The body of an answer with all pictures."""
    first = made[0]
    return {
        "created": int(time.time()),
        "data": [{"b64_json": _base64(each), "seed": each.seed} for each in made],
        **_described(asked, first),
        "steps": first.steps,
        "text_guidance_scale": first.text_guidance_scale,
        "image_guidance_scale": first.image_guidance_scale,
    }


def _described(asked: Asked, edited: Edited) -> dict[str, Any]:
    return {
        "size": f"{edited.width}x{edited.height}",
        "output_format": asked.form.output_format,
        "quality": "auto",
        "background": "opaque",
    }


def event(asked: Asked, edited: Edited, index: int) -> bytes:
    """A preview, the `index`-th, or the picture itself, as one event of a stream."""
    common = {
        "b64_json": _base64(edited),
        "created_at": int(time.time()),
        **_described(asked, edited),
        "seed": edited.seed,
        "step": edited.step,
        "steps": edited.steps,
    }
    if edited.is_preview:
        return sse("image_edit.partial_image", {**common, "partial_image_index": index})
    details = {"image_tokens": 0, "text_tokens": 0}
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    scales = {
        "text_guidance_scale": edited.text_guidance_scale,
        "image_guidance_scale": edited.image_guidance_scale,
    }
    usage_told = {"usage": {**usage, "input_tokens_details": details}}
    return sse("image_edit.completed", {**common, **scales, **usage_told})


def sse(kind: str, body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **body})}\n\n".encode()


def _base64(edited: Edited) -> str:
    return base64.b64encode(edited.data).decode("ascii")


_STATUSES = {
    400: "A field cannot be used; `param` names it.",
    401: "No key, or a wrong one.",
    403: "No keys are configured, and the request comes from another machine.",
    404: "Another model than the one that is served.",
    408: "Not done before the deadline, or the body was not sent in time.",
    413: "The body is too long.",
    415: "Not multipart/form-data.",
    429: "Too many requests wait, or of this key; Retry-After says when to come again.",
    503: "Whatever edits is gone or not there yet; Retry-After says when to come again.",
}


def error_schemas() -> dict[int | str, dict[str, Any]]:
    """What /docs says of each status that is no 200."""
    return {status: _error_schema(text) for status, text in _STATUSES.items()}


def _error_schema(description: str) -> dict[str, Any]:
    text = {"type": "string"}
    maybe = {"type": ["string", "null"]}
    error = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {"message": text, "type": text, "param": maybe, "code": maybe},
    }
    schema = {"type": "object", "required": ["error"], "properties": {"error": error}}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_PICTURE = {
    "type": "object",
    "required": ["b64_json", "seed"],
    "properties": {"b64_json": {"type": "string"}, "seed": {"type": "integer"}},
}
_EVENT = {
    "description": "Of each event. Partial images, and at last the picture or an error.",
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {
            "type": "string",
            "enum": ["image_edit.partial_image", "image_edit.completed", "error"],
        },
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
ANSWER = {
    "description": "The pictures; with stream, events whose data are JSON.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["created", "data", "size", "output_format"],
                "properties": {
                    "created": {"type": "integer"},
                    "data": {"type": "array", "items": _PICTURE},
                    "size": {"type": "string"},
                    "output_format": {"type": "string"},
                    "quality": {"type": "string"},
                    "background": {"type": "string"},
                    "steps": {"type": "integer"},
                    "text_guidance_scale": {"type": "number"},
                    "image_guidance_scale": {"type": "number"},
                },
            }
        },
        "text/event-stream": {"schema": _EVENT},
    },
}
"""Of the 200."""
