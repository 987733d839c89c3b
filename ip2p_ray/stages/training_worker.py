"""What each of Ray Train's workers does: trains, and the first of them notes, saves and exports."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device, prepare_model

from ip2p_ray import logs, storage
from ip2p_ray.checkpoint import (
    latest_checkpoint,
)
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor
from ip2p_ray.errors import ConfigError, StageError
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.memory import is_out_of_memory
from ip2p_ray.pictures import PictureDataset
from ip2p_ray.previews import Shown, decoded, preview
from ip2p_ray.report import size
from ip2p_ray.stages.metrics import TrainingMetrics
from ip2p_ray.stages.training_run import (
    SAMPLES,
    Data,
    TrainingRun,
    export,
    forget_after,
    forget_here,
    note,
    restored_alike,
    save,
    upload,
)
from ip2p_ray.stages.watching import Telling
from ip2p_ray.training.feed import CENTRE
from ip2p_ray.training.loop import Metrics, train
from ip2p_ray.training.sinks import Sink, open_sinks
from ip2p_ray.training.state import TrainState
from ip2p_ray.training.validation import validation_loss

logger = logging.getLogger(__name__)

_PREVIEW_STEPS = 20
_TELL_EVERY_S = 0.5


@ray.remote(num_cpus=0)
class Board:
    """What the first worker said last, and what any warned of, for the driver to show."""

    def __init__(self) -> None:
        self._step, self._measured = 0, ""
        self._warnings: dict[str, None] = {}

    def put(self, step: int, measured: str) -> None:
        """The step that is done, and what to say of it."""
        self._step, self._measured = step, measured

    def warn(self, text: str) -> None:
        """Something that a person should know; all workers may say the same."""
        self._warnings[text] = None

    def read(self) -> tuple[int, str, tuple[str, ...]]:
        """What was put last, and all warnings in the order in which they came."""
        return self._step, self._measured, tuple(self._warnings)


def train_on_worker(arguments: Mapping[str, Any]) -> None:
    """What each worker of the trainer runs; rank 0 saves, and exports the editor at the end.

    Raises:
        StageError: the device has too little memory; says what to change.
    """
    rank = ray.train.get_context().get_world_rank()
    logs.follow(**arguments["about"], actor=f"worker {rank}")
    logging.getLogger("ip2p_ray").addHandler(Telling(arguments["board"]))
    too_large = None
    try:
        _train(arguments["told"], arguments["board"])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        too_large = (str(error).splitlines() or [type(error).__name__])[0]
    if too_large is not None:
        raise StageError(
            f"training: a worker's device is too small ({too_large}): take a smaller --micro-batch "
            "(the same run goes on), or begin anew with --gradient-checkpointing True, --bf16 True "
            "or --lora-rank"
        )


def _train(told: TrainingRun, board: Any) -> None:
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    model, state = restored_alike(told, get_device(), rank=rank)
    data = told.source.open(model)
    if told.carried.validate_every is not None and not len(data.of("held_out")):
        raise ConfigError(f"{told.source.uri} has no held-out pairs: leave out --validate-every")
    if rank == 0:
        forget_after(told.here, state.step)
        last = latest_checkpoint(told.here)
        if last is not None:
            upload(told, last)  # the run may have been killed before it did
    steps = train(
        model,
        data.of("train"),
        told.config,
        rank=rank,
        world_size=world_size,
        micro_batch=told.carried.micro_batch,
        readers=told.carried.readers,
        wrap=partial(_wrapped, world_size, told.carried.compile),
        state=state,
    )
    with ExitStack() as stack:
        sinks: list[Sink] = []
        if rank == 0:
            config = asdict(told.config)
            sinks = stack.enter_context(
                open_sinks(
                    told.carried.sinks,
                    told.here.parent,
                    step=state.step,
                    config=config,
                    run=told.out,
                )
            )
        watch = _Watch(told, model, state, data, rank, world_size, board, sinks)
        for metrics in steps:
            watch.after(metrics)
    if rank == 0:
        export(told, model, state)
    ray.train.report({"step": state.step})
    if world_size > 1:
        torch.distributed.barrier()
    if context.get_local_rank() == 0:
        forget_here(told)


class _Watch:
    """What is done between two optimizer steps; every rank has one, most of it is rank 0's."""

    def __init__(
        self,
        told: TrainingRun,
        model: StableDiffusion,
        state: TrainState,
        data: Data,
        rank: int,
        world_size: int,
        board: Any,
        sinks: Sequence[Sink],
    ) -> None:
        self.told, self.model, self.state, self.data = told, model, state, data
        self.rank, self.world_size, self.board, self.sinks = rank, world_size, board, sinks
        self.metrics = TrainingMetrics(rank, world_size, told.config.batch_size)
        self.held_out = data.of("held_out")
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.shown_at = 0.0
        self.shown: list[Shown] | None = None

    def after(self, metrics: Metrics) -> None:
        """Everything that is due after the step."""
        carried, steps = self.told.carried, self.told.config.steps
        self.losses.append(metrics.loss)
        self.metrics.stepped(metrics.step, metrics.loss, metrics.seconds, metrics.waited)
        self.seconds = [*self.seconds[-19:], metrics.seconds]
        noted: dict[str, Any] = {}
        if len(self.held_out) and carried.due(carried.validate_every, metrics.step, steps):
            noted["validation_loss"] = self._validate()
        if self.rank:
            return
        self._tell(metrics)
        if carried.due(carried.sample_every, metrics.step, steps):
            self._preview(metrics.step)
        if carried.logs(metrics.step, steps) or noted:
            known = {**asdict(metrics), "loss": fmean(self.losses), "workers": self.world_size}
            noted = {**known, **self._speed(), **noted}
            self.losses.clear()
            note(self.told.here, noted)
            for sink in self.sinks:
                sink.write(metrics.step, {k: v for k, v in noted.items() if k != "step"})
        if carried.saves(metrics.step, steps):
            began = time.monotonic()
            save(self.told, self.state)
            self.metrics.saved(time.monotonic() - began)
            logger.debug("the checkpoint of step %d is saved", metrics.step)

    def _validate(self) -> float:
        config, carried = self.told.config, self.told.carried
        with self.state.ema.applied_to(self.state.unet):
            return validation_loss(
                self.model,
                self.state.unet,
                self.held_out,
                groups=carried.validation_groups,
                batch_size=carried.micro_batch or 8,
                rank=self.rank,
                world_size=self.world_size,
                bf16=config.bf16,
            )

    def _speed(self) -> dict[str, float]:
        found = {"images_per_s": self.told.config.batch_size / fmean(self.seconds)}
        if torch.cuda.is_available():
            found["device_bytes"] = float(torch.cuda.max_memory_allocated())
        return found

    def _tell(self, metrics: Metrics) -> None:
        if time.monotonic() - self.shown_at < _TELL_EVERY_S and metrics.step != 1:
            return
        self.shown_at = time.monotonic()
        speed = self._speed()
        text = f"loss {fmean(self.losses):.4f}, {speed['images_per_s']:.1f} images/s"
        if "device_bytes" in speed:
            text += f", {size(speed['device_bytes'])} of the device"
        self.board.put.remote(metrics.step, text)

    def _preview(self, step: int) -> None:
        settings = replace(self.told.editing, steps=min(_PREVIEW_STEPS, self.told.editing.steps))
        if self.shown is None:
            part = self.held_out if len(self.held_out) else self.data.of("train")
            count = min(self.told.carried.samples, len(part))
            self.shown = [_shown(self.model, part, index) for index in range(count)]
        unet = self.state.unet
        with self.state.ema.applied_to(unet):
            page = preview(Editor(self.model, settings=settings), self.shown)
        place = storage.join(self.told.out, SAMPLES, f"step-{step:08d}.png")
        storage.write_bytes(place, encode_png(page))


def _shown(model: StableDiffusion, data: Data, index: int) -> Shown:
    """A pair as pictures, decoded where only latents are there."""
    if isinstance(data, PictureDataset):
        row = data.read_pictures(index, pick=0.0, flip=False, crop=CENTRE)
        return Shown(
            instruction=row.instruction, source=to_pil(row.source), edited=to_pil(row.edited)
        )
    found = data.read(index)
    arrays = [
        torch.tensor(array, dtype=torch.float32) for array in (found.source_mode, found.edited_mean)
    ]
    source, edited = decoded(model, torch.stack(arrays))
    return Shown(instruction=found.instruction, source=source, edited=edited)


def _wrapped(world_size: int, compiled: bool, unet: torch.nn.Module) -> torch.nn.Module:
    """The UNet as it is called in training."""
    wrapped: Any = prepare_model(unet, move_to_device=False) if world_size > 1 else unet
    if compiled:
        wrapped = torch.compile(wrapped)
    module: torch.nn.Module = wrapped
    return module
