"""Requests to a service under test, many at a time."""

import asyncio
import base64
import io
import time
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image


def picture_bytes(seed=0, size=(64, 64), kind="PNG"):
    """A picture of noise that no other seed has."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def pixels_of(b64):
    """int (height, width, 3) of an answer."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB")).astype(int)


@dataclass
class Answer:
    status: int
    body: dict
    headers: dict
    seconds: float


async def ask(client, url, *, image=None, seed=0, prompt="make it night", **fields):
    """One request; the connection's failures are raised."""
    began = time.monotonic()
    response = await client.post(
        f"{url}/v1/images/edits",
        files={"image": ("a.png", image or picture_bytes(seed), "image/png")},
        data={"prompt": prompt, "seed": str(seed), **{k: str(v) for k, v in fields.items()}},
    )
    body = response.json() if "json" in response.headers.get("content-type", "") else {}
    return Answer(response.status_code, body, dict(response.headers), time.monotonic() - began)


async def ask_all(url, count, **fields):
    """So many at once, with seeds from 0."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=900, limits=limits) as client:
        return await asyncio.gather(
            *(ask(client, url, seed=seed, **fields) for seed in range(count))
        )
