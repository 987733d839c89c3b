"""A training run as all its processes know it, and where what it makes lies.

In a shared folder everything is written where it stays. What goes to a bucket is written to a
folder of the machine first (`TrainingRun.here`), and counts once it is in the bucket: workers go on
from there alone, so the next may run on another machine, or on this one with its disk lost.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ip2p_ray import __version__, mirror, storage
from ip2p_ray.atomic import sync
from ip2p_ray.card import model_card
from ip2p_ray.checkpoint import (
    export_editor,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from ip2p_ray.copies import cache_folder, local_dataset, local_folder
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import EditSettings
from ip2p_ray.errors import ConfigError, StageError
from ip2p_ray.latents import LatentDataset
from ip2p_ray.pictures import PictureDataset
from ip2p_ray.training.ema import ema_horizon
from ip2p_ray.training.loop import TrainConfig, start
from ip2p_ray.training.state import TrainState

METRICS = "metrics.jsonl"
SAMPLES = "samples"
TENSORBOARD = "tensorboard"
INDEX = "model_index.json"
"""Of a diffusers folder; of one in a bucket it is written last."""

Data = LatentDataset | PictureDataset

_AGREEMENTS = 3
"""How often workers look for the newest checkpoint until all have the same."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is trained on."""

    uri: str
    """A dataset of latents; of pairs where `resolution` is given."""
    resolution: int | None = None
    """Height and width that the pictures of pairs are cut to; the autoencoder then runs in every
    step."""
    cache: str | None = None
    """Folder of each node for copies of what lies in a bucket; None is the usual one."""

    def open(self, model: StableDiffusion) -> Data:
        """All pairs, of every split; from a copy on this machine where they lie in a bucket."""
        folder = local_dataset(self.uri, self.cache)
        if self.resolution is None:
            return LatentDataset(folder)
        height, width = model.latent_size(self.resolution, self.resolution)
        shape = (model.latent_channels, height, width)
        return PictureDataset(folder, resolution=self.resolution, shape=shape)


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
    """s3://... that every checkpoint is copied to, beside a folder here."""

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
    out: str
    """Folder of the run, absolute because workers run in folders of their own; or s3://..."""
    editing: EditSettings
    carried: Carried = field(default_factory=Carried)

    @property
    def checkpoints(self) -> str:
        """Where the checkpoints and METRICS are to be found."""
        return storage.join(self.out, "checkpoints")

    @property
    def editor(self) -> str:
        """Where the finished editor is to be found."""
        return storage.join(self.out, "editor")

    @property
    def in_bucket(self) -> bool:
        """Whether nothing counts that lies on a disk."""
        return not storage.is_local(self.out)

    @property
    def here(self) -> Path:
        """Folder of this machine that checkpoints and METRICS are written to."""
        if not self.in_bucket:
            return Path(self.checkpoints)
        name = blake2b(f"{self.out} {self.recipe}".encode(), digest_size=8).hexdigest()
        return cache_folder(self.source.cache) / "runs" / name / "checkpoints"

    @property
    def ray(self) -> Path:
        """Ray Train's folder on the driver's machine, which nobody reads.

        Ray Train writes there in the driver and in its controller, which runs on the driver's node.
        A worker would with a checkpoint that it reports, and none does: no other node needs it.
        """
        return self.here.parent.with_suffix(".ray") if self.in_bucket else self.here / ".ray"

    @property
    def newest_step(self) -> int:
        """Of the checkpoints that count; 0 where there is none."""
        if self.in_bucket:
            name = mirror.newest(self.checkpoints)
        else:
            found = latest_checkpoint(self.checkpoints)
            name = found.name if found else None
        return int(name.removeprefix("step-")) if name else 0


def restored(
    told: TrainingRun, device: str | torch.device, *, writes: bool = True
) -> tuple[StableDiffusion, TrainState]:
    """The model and the state of the newest checkpoint, or of the start where there is none.

    Of several workers the one that writes METRICS fetches it from a bucket.
    """
    if told.in_bucket:
        mirror.fetch_alone(
            told.checkpoints, told.here, beside=METRICS if writes else None, recipe=told.recipe
        )
    source = local_folder(told.generator, told.source.cache)
    model = StableDiffusion.load(source, device=device)
    state = start(model, told.config)
    state.run["recipe"] = told.recipe
    found = latest_checkpoint(told.here)
    if found is not None:
        load_checkpoint(found, state)
    return model, state


def restored_alike(
    told: TrainingRun, device: str | torch.device, *, rank: int
) -> tuple[StableDiffusion, TrainState]:
    """As `restored`, for all ranks at the same step.

    A machine may hold a sound copy of a checkpoint that another finds broken in the bucket. It is
    none from then on, so that whoever asks again finds the one before.

    Raises:
        StageError: the ranks' steps differ still.
    """
    for _ in range(_AGREEMENTS):
        model, state = restored(told, device, writes=rank == 0)
        steps = torch.tensor([state.step, -state.step], device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
        if steps[0] == -steps[1]:
            return model, state
        del model, state  # the device may have room for one only
    raise StageError(
        f"training: workers found checkpoints of steps {-int(steps[1])} to {int(steps[0])} of "
        f"{told.checkpoints}; run the same command again"
    )


def save(told: TrainingRun, state: TrainState) -> None:
    """The checkpoint of the state; it is in the bucket too once this returns, where there is one.

    Raises:
        StageError: it cannot be written; the one before is there still.
        StorageError: the bucket refuses, or cannot be reached; the one before is there still.
    """
    root, keep = told.here, 1 if told.in_bucket else told.carried.keep
    try:
        if (root / METRICS).exists():  # no kill leaves a checkpoint without its line
            sync(root / METRICS)
        saved = save_checkpoint(root, state, keep=keep)
    except (OSError, SafetensorError) as error:
        found = latest_checkpoint(root)
        before = f"the newest is {found.name}" if found else "there is none yet"
        raise StageError(
            f"training: the checkpoint of step {state.step} cannot be written to {root} "
            f"({error}); {before}, and the same command goes on from there once there is room"
        ) from error
    upload(told, saved)


def upload(told: TrainingRun, saved: Path) -> None:
    """Copies the checkpoint to the run's bucket, or its mirror; nothing if it is there already.

    Raises:
        StorageError: the bucket refuses, or cannot be reached.
    """
    bucket = told.checkpoints if told.in_bucket else told.carried.mirror
    if bucket is None:
        return
    if (told.here / METRICS).exists():
        mirror.upload_file(told.here / METRICS, bucket)
    mirror.upload_checkpoint(saved, bucket, keep=told.carried.keep)
    if told.in_bucket:
        for events in sorted((told.here.parent / TENSORBOARD).glob("*")):
            mirror.upload_file(events, storage.join(told.out, TENSORBOARD))


def export(told: TrainingRun, model: StableDiffusion, state: TrainState) -> None:
    """The editor's folder with its model card; in a bucket its INDEX comes last."""
    config = told.config
    noted = [json.loads(line) for line in noted_lines(told.here)]
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
    folder = told.here.parent / "editor" if told.in_bucket else Path(told.editor)
    export_editor(model, state.ema, folder, asdict(told.editing), card=card)
    if told.in_bucket:
        mirror.upload_folder(folder, told.editor, last=INDEX)


def forget_here(told: TrainingRun) -> None:
    """Deletes what a run whose everything is in a bucket has left on this machine."""
    if told.in_bucket:
        shutil.rmtree(told.here.parent, ignore_errors=True)


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
    place = storage.join(checkpoints, METRICS)
    text = storage.read_bytes(place).decode() if storage.exists(place) else ""
    # a worker whose driver was killed may have lived on for a moment
    by_step = {
        json.loads(line)["step"]: line
        for line in text.splitlines(keepends=True)
        if line.endswith("\n")
    }
    return list(by_step.values())
