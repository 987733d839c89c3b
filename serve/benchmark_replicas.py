"""The three ways of editing that `jobs/benchmark.py editor` compares, as replicas of the service.

All load the same model in the same way, and have the same HTTP front before them.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from ray import serve

from ip2p_ray.benchmark.editors import as_pipeline, random_editor
from ip2p_ray.editor import Editor
from ip2p_ray.engine import EngineRequest
from ip2p_ray.images import fit_image
from serve.deployment import EditorReplica, ReplicaConfig, load_editor
from serve.engine_editing import check_upload
from serve.metrics import ReplicaMetrics
from serve.orders import Edited, Order

SD15 = "random weights in the shapes of Stable Diffusion 1.5"
"""Given as the model, that is made."""


@dataclass(frozen=True)
class Done:
    """What a replica did so far."""

    batches: int = 0
    """That went through the UNet: steps of the engine, or calls of the pipeline."""
    rows: int = 0
    """Requests in them, together."""
    cpu_s: float = 0.0
    """CPU time of all threads of the process."""


class Filling(ReplicaMetrics):
    """The service's own metrics, and how full the engine's batches were."""

    def __init__(self) -> None:
        super().__init__()
        self.batches, self.rows = 0, 0

    def stepped(self, rows: int, most: float, seconds: float) -> None:
        """One more batch."""
        super().stepped(rows, most, seconds)
        self.batches += 1
        self.rows += rows


class Engine(EditorReplica):
    """Ours: the service's replica, whose engine batches step by step."""

    def __init__(self, config: ReplicaConfig) -> None:
        super().__init__(config)
        self._filling = Filling()

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Loads the model."""
        editor = await asyncio.to_thread(load, config["model"], self._config)
        self._editing = self._make(editor, self._config.engine, observer=self._filling)

    async def done(self) -> Done:
        """What was done so far."""
        return Done(self._filling.batches, self._filling.rows, time.process_time())

    async def bare_seconds(self, orders: list[Order]) -> list[float]:
        """What each order takes on the engine alone, one after another: no HTTP, no file made."""
        return await asyncio.to_thread(self._bare_seconds, orders)

    def _bare_seconds(self, orders: list[Order]) -> list[float]:
        assert self._editing is not None
        found = []
        for order in orders:
            assert order.steps is not None
            request = EngineRequest(
                image=order.image,
                instruction=order.instruction,
                seed=order.seeds[0],
                steps=order.steps,
                size=order.size,
                text_guidance_scale=order.text_guidance_scale or 0.0,
                image_guidance_scale=order.image_guidance_scale or 0.0,
            )
            began = time.perf_counter()
            self._editing.engine.submit(request).result()
            found.append(time.perf_counter() - began)
        return found


class OneByOne:
    """The reference: one diffusers pipeline, which takes a request when the one before is done."""

    def __init__(self, config: ReplicaConfig) -> None:
        torch.set_num_threads(config.threads)
        self._config = config
        self._device = ThreadPoolExecutor(1)
        self._batches, self._rows = 0, 0
        self._pipeline: Any = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Loads the model."""
        self._pipeline = await asyncio.to_thread(_pipeline, config["model"], self._config)

    async def edit(self, order: Order) -> list[Edited]:
        """See `Editing`."""
        picture = await asyncio.to_thread(_picture, order)
        made = await asyncio.gather(*(self._make(_Job(order, picture, s)) for s in order.seeds))
        return list(
            await asyncio.gather(
                *(
                    asyncio.to_thread(_edited, order, seed, one)
                    for seed, one in zip(order.seeds, made, strict=True)
                )
            )
        )

    async def stream(self, order: Order) -> AsyncGenerator[Edited, None]:
        """The picture alone; a pipeline shows nothing on the way."""
        for edited in await self.edit(order):
            yield edited

    async def done(self) -> Done:
        """What was done so far."""
        return Done(self._batches, self._rows, time.process_time())

    async def _make(self, job: _Job) -> Image.Image:
        [made] = await self._run([job])
        return made

    async def _run(self, jobs: list[_Job]) -> list[Image.Image]:
        """The pictures of jobs that are alike, in one call of the pipeline."""
        loop = asyncio.get_running_loop()
        made = await loop.run_in_executor(self._device, self._call, jobs)
        self._batches += 1
        self._rows += len(jobs)
        return made

    def _call(self, jobs: list[_Job]) -> list[Image.Image]:
        order = jobs[0].order
        found = self._pipeline(
            [job.order.instruction for job in jobs],
            image=[job.picture for job in jobs],
            num_inference_steps=order.steps,
            guidance_scale=order.text_guidance_scale,
            image_guidance_scale=order.image_guidance_scale,
            generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
            output_type="pil",
        )
        return list(found.images)


class RequestBatching(OneByOne):
    """The same pipeline on batches of whole requests, gathered by `serve.batch`."""

    def __init__(self, config: ReplicaConfig) -> None:
        super().__init__(config)
        self._batched.set_max_batch_size(config.engine.batch_size)  # type: ignore[attr-defined]

    async def wait_for_batches(self, seconds: float) -> None:
        """Sets how long a batch waits to become full."""
        self._batched.set_batch_wait_timeout_s(seconds)  # type: ignore[attr-defined]

    async def _make(self, job: _Job) -> Image.Image:
        made: Image.Image = await self._batched(job)
        return made

    @serve.batch
    async def _batched(self, jobs: list[_Job]) -> list[Image.Image]:
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, job in enumerate(jobs):
            alike[job.kind].append(index)
        made: dict[int, Image.Image] = {}
        for indices in alike.values():
            pictures = await self._run([jobs[index] for index in indices])
            made.update(zip(indices, pictures, strict=True))
        return [made[index] for index in range(len(jobs))]


@dataclass(frozen=True)
class _Job:
    """One picture to make."""

    order: Order
    picture: Image.Image
    """At the size at which it is edited."""
    seed: int

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a call of the pipeline has one of."""
        order = self.order
        scales = order.text_guidance_scale, order.image_guidance_scale
        return (self.picture.size, order.steps, *scales)


def load(model: str | None, config: ReplicaConfig) -> Editor:
    """The editor, with the steps that diffusers' pipeline takes by itself, Euler-ancestral."""
    if model == SD15:
        editor = random_editor(config.device, getattr(torch, config.dtype))
    else:
        editor = load_editor(model, config)
    editor.settings = replace(editor.settings, sampler="euler_ancestral", guidance_rescale=0.0)
    return editor


def _pipeline(model: str | None, config: ReplicaConfig) -> Any:
    return as_pipeline(load(model, config).model)


def _picture(order: Order) -> Image.Image:
    assert order.size is not None
    check_upload(order.image)
    with Image.open(io.BytesIO(order.image)) as opened:
        return fit_image(opened.convert("RGB"), order.size)


def _edited(order: Order, seed: int, picture: Image.Image) -> Edited:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=3)
    steps, text, image = order.steps, order.text_guidance_scale, order.image_guidance_scale
    assert steps is not None
    assert text is not None
    assert image is not None
    return Edited(
        data=stream.getvalue(),
        width=picture.width,
        height=picture.height,
        seed=seed,
        step=steps,
        steps=steps,
        text_guidance_scale=text,
        image_guidance_scale=image,
    )
