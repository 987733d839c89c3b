"""What each of Ray Train's workers does: trains, and the first of them notes, saves and exports."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device, prepare_model
from safetensors import SafetensorError

from ip2p_ray import __version__, storage
from ip2p_ray.atomic import sync
from ip2p_ray.card import model_card
from ip2p_ray.checkpoint import (
    export_editor,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.errors import ConfigError, StageError
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.latents import LatentDataset
from ip2p_ray.memory import is_out_of_memory
from ip2p_ray.mirror import upload_checkpoint, upload_file
from ip2p_ray.pictures import PictureDataset
from ip2p_ray.previews import Shown, decoded, preview
from ip2p_ray.report import size
from ip2p_ray.stages.metrics import TrainingMetrics
from ip2p_ray.training.ema import ema_horizon
from ip2p_ray.training.feed import CENTRE
from ip2p_ray.training.loop import Metrics, TrainConfig, start, train
from ip2p_ray.training.sinks import Sink, open_sinks
from ip2p_ray.training.state import TrainState
from ip2p_ray.training.validation import validation_loss

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
SAMPLES = "samples"
_PREVIEW_STEPS = 20
_TELL_EVERY_S = 0.5

Data = LatentDataset | PictureDataset


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is trained on."""

    uri: str
    """A dataset of latents; of pairs where `resolution` is given."""
    resolution: int | None = None
    """Height and width that the pictures of pairs are cut to; the autoencoder then runs in every
    step."""

    def open(self, model: StableDiffusion) -> Data:
        """All pairs, of every split."""
        if self.resolution is None:
            return LatentDataset(self.uri)
        height, width = model.latent_size(self.resolution, self.resolution)
        shape = (model.latent_channels, height, width)
        return PictureDataset(self.uri, resolution=self.resolution, shape=shape)


@dataclass(frozen=True, kw_only=True)
class Carried:
    """How a run is carried out and watched; nothing of it changes what is learned."""

    micro_batch: int | None = None
    """Samples that a worker computes at a time; None splits by config.gradient_accumulation."""
    readers: int = 1
    """Threads of each worker that read ahead."""
    compile: bool = False
    """Compile the UNet, anew in every attempt; figures differ in their last digits."""
    save_every: int | None = None
    """Optimizer steps between two checkpoints; None makes about a dozen."""
    log_every: int | None = None
    """Optimizer steps between two lines of metrics; there is one with each checkpoint anyway."""
    keep: int = 2
    """Checkpoints that are kept, the newest."""
    validate_every: int | None = None
    """Optimizer steps between two measurements of the held-out loss; None makes none."""
    validation_groups: int = 256
    """Triplet groups that it is measured on, at most."""
    sample_every: int | None = None
    """Optimizer steps between two pages of sample pictures; None makes none."""
    samples: int = 4
    """Pictures on a page."""
    sinks: Sequence[str] = ()
    """Where figures go besides METRICS, see training.sinks."""
    mirror: str | None = None
    """s3://... that every checkpoint is copied to."""

    def __post_init__(self) -> None:
        for name in ("micro_batch", "readers", "save_every", "log_every", "keep"):
            self._at_least_1(name)
        for name in ("validate_every", "validation_groups", "sample_every", "samples"):
            self._at_least_1(name)

    def _at_least_1(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is at least 1, got {value}")

    def saves(self, step: int, steps: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return step % (self.save_every or -(-steps // 12)) == 0 or step == steps

    def logs(self, step: int, steps: int) -> bool:
        """Whether a line of metrics is due after this step."""
        own = self.log_every is not None and step % self.log_every == 0
        return own or self.saves(step, steps)

    def due(self, every: int | None, step: int, steps: int) -> bool:
        """Whether what is done so often is due after this step; always after the last."""
        return every is not None and (step % every == 0 or step == steps)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What every worker is told."""

    config: TrainConfig
    generator: str
    """Where training starts."""
    fingerprint: str
    """Of it."""
    recipe: str
    """Digest of all that makes the run; a checkpoint of another is not gone on with."""
    source: Source
    data: Mapping[str, Any]
    """What the source's manifest says, for the model card."""
    checkpoints: str
    """Folder of the checkpoints and of METRICS, absolute: workers run in folders of their own."""
    editor: str
    """Folder that the finished editor is exported to."""
    editing: EditSettings
    carried: Carried = field(default_factory=Carried)


@ray.remote(num_cpus=0)
class Board:
    """What the first worker said last, for the driver to show."""

    def __init__(self) -> None:
        self._step, self._measured = 0, ""

    def put(self, step: int, measured: str) -> None:
        """The step that is done, and what to say of it."""
        self._step, self._measured = step, measured

    def read(self) -> tuple[int, str]:
        """What was put last."""
        return self._step, self._measured


def train_on_worker(arguments: Mapping[str, Any]) -> None:
    """What each worker of the trainer runs; rank 0 saves, and exports the editor at the end.

    Raises:
        StageError: the device has too little memory; says what to change.
    """
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
    model, state = restored(told, get_device())
    data = told.source.open(model)
    if told.carried.validate_every is not None and not len(data.of("held_out")):
        raise ConfigError(f"{told.source.uri} has no held-out pairs: leave out --validate-every")
    if rank == 0:
        forget_after(told.checkpoints, state.step)
        last = latest_checkpoint(told.checkpoints)
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
            folder = Path(told.checkpoints).parent
            sinks = stack.enter_context(
                open_sinks(told.carried.sinks, folder, step=state.step, config=config)
            )
        watch = _Watch(told, model, state, data, rank, world_size, board, sinks)
        for metrics in steps:
            watch.after(metrics)
    if rank == 0:
        export(told, model, state)
    ray.train.report({"step": state.step})
    if world_size > 1:
        torch.distributed.barrier()


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
            note(self.told.checkpoints, noted)
            for sink in self.sinks:
                sink.write(metrics.step, {k: v for k, v in noted.items() if k != "step"})
        if carried.saves(metrics.step, steps):
            began = time.monotonic()
            save(self.told, self.state)
            self.metrics.saved(time.monotonic() - began)

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
        place = Path(self.told.checkpoints).parent / SAMPLES / f"step-{step:08d}.png"
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


def restored(told: TrainingRun, device: str | torch.device) -> tuple[StableDiffusion, TrainState]:
    """The model and the state of the newest checkpoint, or of the start where there is none."""
    model = StableDiffusion.load(told.generator, device=device)
    state = start(model, told.config)
    state.run["recipe"] = told.recipe
    found = latest_checkpoint(told.checkpoints)
    if found is not None:
        load_checkpoint(found, state)
    return model, state


def save(told: TrainingRun, state: TrainState) -> None:
    """The checkpoint of the state, and its copy where one is asked for.

    Raises:
        StageError: it cannot be written; the one before is there still.
    """
    carried = told.carried
    root = Path(told.checkpoints)
    try:
        if (root / METRICS).exists():  # no kill leaves a checkpoint without its line
            sync(root / METRICS)
        saved = save_checkpoint(root, state, keep=carried.keep)
    except (OSError, SafetensorError) as error:
        found = latest_checkpoint(root)
        before = f"the newest is {found.name}" if found else "there is none yet"
        raise StageError(
            f"training: the checkpoint of step {state.step} cannot be written to {root} "
            f"({error}); {before}, and the same command goes on from there once there is room"
        ) from error
    upload(told, saved)


def upload(told: TrainingRun, saved: Path) -> None:
    """Copies the checkpoint to the mirror, where one is asked for; nothing if it is there.

    Raises:
        StorageError: the mirror refuses, or cannot be reached.
    """
    if told.carried.mirror is not None:
        notes = Path(told.checkpoints) / METRICS
        if notes.exists():
            upload_file(notes, told.carried.mirror)
        upload_checkpoint(saved, told.carried.mirror, keep=told.carried.keep)


def export(told: TrainingRun, model: StableDiffusion, state: TrainState) -> None:
    """The editor's folder with its model card."""
    config = told.config
    noted = [json.loads(line) for line in noted_lines(told.checkpoints)]
    scores = {
        name: [line[name] for line in noted if name in line][-1]
        for name in ("loss", "validation_loss", "images_per_s")
        if any(name in line for line in noted)
    }
    recipe = {
        **asdict(config),
        "ema_horizon": round(ema_horizon(config.ema_decay, max(1, state.ema.updates)), 1),
        "steps done": state.step,
    }
    card = model_card(
        version=__version__,
        start={"model": told.generator, "fingerprint": told.fingerprint},
        data={**told.data, "resolution": told.source.resolution},
        recipe=recipe,
        scores=scores,
    )
    export_editor(model, state.ema, told.editor, asdict(told.editing), card=card)


def note(checkpoints: str | Path, metrics: Mapping[str, Any]) -> None:
    """A line of METRICS more; it is on the disk when the next checkpoint is saved."""
    path = Path(checkpoints) / METRICS
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(metrics)) + "\n")


def forget_after(checkpoints: str | Path, step: int) -> None:
    """Drops the notes of steps that are taken again, and a line that was cut by a kill."""
    kept = [line for line in noted_lines(checkpoints) if json.loads(line)["step"] <= step]
    storage.write_bytes(Path(checkpoints) / METRICS, "".join(kept).encode())


def noted_lines(checkpoints: str | Path) -> list[str]:
    """The lines of METRICS, one for a step, without one whose end was cut off."""
    path = Path(checkpoints) / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    # a worker whose driver was killed may have lived on for a moment
    by_step = {json.loads(line)["step"]: line for line in lines if line.endswith("\n")}
    return list(by_step.values())
