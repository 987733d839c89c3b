"""Requests to the editor's service as people send them: when they come, and how long they wait.

Every request asks for another picture with another instruction, so that no cache helps. Waiting is
counted from the moment at which a request was due, not from when it was sent: a service that falls
behind must not slow down those who ask (coordinated omission).
"""

from __future__ import annotations

import asyncio
import io
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from ip2p_ray.errors import ConfigError
from ip2p_ray.miniature import grammar, scenes

BUSY = 429
"""The status of a request that was refused because too many wait."""
BURST = 6
"""Requests of a burst, on average."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of every picture."""

    steps: int
    text_guidance_scale: float
    image_guidance_scale: float
    resolution: int
    """Height and width in pixels."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Requests that a service is sent."""

    url: str
    """Of the service, without a path."""
    asked: Asked
    first: int
    """The first request's number; each number is a picture, an instruction and a seed."""
    count: int
    arrivals: tuple[float, ...] | None = None
    """When each is due, in seconds from the start; None: each when one before was answered."""
    concurrency: int = 1
    """Without `arrivals`, how many are under way."""
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Answer:
    """What became of one request; times are seconds from the start of the offer."""

    due: float
    sent: float
    ended: float
    status: int
    """Of HTTP, or 0 where the connection failed."""

    @property
    def waited(self) -> float:
        """Seconds from when it was due until it was answered."""
        return self.ended - self.due


def poisson_arrivals(rate: float, count: int, seed: int) -> tuple[float, ...]:
    """When `count` requests are due that know nothing of each other, `rate` a second in all."""
    rng = random.Random(seed)
    at, found = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        found.append(at)
    return _paced(found, rate)


def bursty_arrivals(
    rate: float, count: int, seed: int, *, burst: float = BURST
) -> tuple[float, ...]:
    """As many, in bursts: all of a burst are due at once, bursts at Poisson moments.

    Sizes are geometric with mean `burst`.
    """
    if burst < 1:
        raise ConfigError(f"burst is at least 1, got {burst}")
    rng = random.Random(seed)
    at, found = 0.0, list[float]()
    while len(found) < count:
        at += rng.expovariate(rate / burst)
        size = 1
        while rng.random() >= 1 / burst:
            size += 1
        found += [at] * size
    return _paced(found[:count], rate)


def _paced(moments: Sequence[float], rate: float) -> tuple[float, ...]:
    """The moments, stretched to the rate exactly: by chance a few requests may be far from it."""
    stretch = len(moments) / rate / moments[-1]
    return tuple(moment * stretch for moment in moments)


ARRIVALS = {"poisson": poisson_arrivals, "bursty": bursty_arrivals}
"""By the names under which they are told."""


def request_body(number: int, resolution: int) -> tuple[str, bytes]:
    """The instruction and the PNG of one request; no two numbers have one of them in common."""
    rng = random.Random(number)
    scene = scenes.random_scene(rng)
    _, instruction, _ = grammar.triplet(scene, scenes.random_edit(scene, rng), rng)
    picture = Image.fromarray(scenes.draw(scene))
    if picture.size != (resolution, resolution):
        picture = picture.resize((resolution, resolution), Image.Resampling.BICUBIC)
    # the grammar repeats itself, and a scene too may come twice
    red, green = divmod(number % 2**16, 256)
    picture.putpixel((0, 0), (red, green, (number >> 16) % 256))
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=3)
    return f"{instruction}, {number}", stream.getvalue()


def send(offer: Offer) -> list[Answer]:
    """The answers in the order of the requests; the bodies are made before the clock starts."""
    asked = offer.asked
    numbers = range(offer.first, offer.first + offer.count)
    bodies = [request_body(number, asked.resolution) for number in numbers]
    fields = [
        {
            "prompt": instruction,
            "seed": str(number),
            "steps": str(asked.steps),
            "size": f"{asked.resolution}x{asked.resolution}",
            "text_guidance_scale": str(asked.text_guidance_scale),
            "image_guidance_scale": str(asked.image_guidance_scale),
            "deadline_s": str(offer.timeout_s),
        }
        for number, (instruction, _) in zip(numbers, bodies, strict=True)
    ]
    requests = [(data, body) for data, (_, body) in zip(fields, bodies, strict=True)]
    return asyncio.run(_send(offer, requests))


async def _send(offer: Offer, requests: Sequence[tuple[dict[str, str], bytes]]) -> list[Answer]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # a proxy of the environment is not between this machine and itself
    async with httpx.AsyncClient(
        base_url=offer.url, limits=limits, timeout=offer.timeout_s, trust_env=False
    ) as client:
        began = time.perf_counter()

        async def one(index: int, due: float | None) -> Answer:
            data, body = requests[index]
            sent = time.perf_counter() - began
            try:
                response = await client.post(
                    "/v1/images/edits", data=data, files={"image": ("image.png", body, "image/png")}
                )
                status = response.status_code
            except httpx.HTTPError:
                status = 0
            return Answer(sent if due is None else due, sent, time.perf_counter() - began, status)

        if offer.arrivals is None:
            return await _in_turn(offer, one)
        tasks = []
        for index, due in enumerate(offer.arrivals):
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - began)))
            tasks.append(asyncio.create_task(one(index, due)))
        return list(await asyncio.gather(*tasks))


async def _in_turn(offer: Offer, one: Any) -> list[Answer]:
    """As many under way as asked for, each sent when one before was answered."""
    waiting = iter(range(offer.count))
    answers: dict[int, Answer] = {}

    async def client() -> None:
        for index in waiting:
            answers[index] = await one(index, None)

    await asyncio.gather(*(client() for _ in range(offer.concurrency)))
    return [answers[index] for index in range(offer.count)]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least value that at least this share of the values does not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """What is told of an offer; waiting is of the answered requests alone.

    `images_per_s` is counted from when the first was due to the last answer, `late_s` is how much
    later than due a request was sent at most: a generator of load that falls behind shows.
    """
    answered = [each for each in answers if each.status == 200]
    waited = [each.waited for each in answered]
    span = max((each.ended for each in answered), default=0.0) - min(each.due for each in answers)
    return {
        "requests": len(answers),
        "answered": len(answered),
        "rejected": sum(each.status == BUSY for each in answers),
        "failed": sum(each.status not in (200, BUSY) for each in answers),
        "images_per_s": len(answered) / span if answered else 0.0,
        "p50_s": percentile(waited, 0.5),
        "p95_s": percentile(waited, 0.95),
        "p99_s": percentile(waited, 0.99),
        "late_s": max(each.sent - each.due for each in answers),
    }
