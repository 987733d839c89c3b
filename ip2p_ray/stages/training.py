"""latents -> checkpoints -> editor: the training loop in Ray Train's workers.

Checkpoints are this package's own (`checkpoint`): a run that was killed, or that lost a worker,
goes on at the newest whole one, whatever Ray had heard of it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model

from ip2p_ray import storage
from ip2p_ray.atomic import sync
from ip2p_ray.checkpoint import (
    export_editor,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import EditSettings
from ip2p_ray.errors import StageError
from ip2p_ray.latents import LatentDataset
from ip2p_ray.report import Report
from ip2p_ray.stages import plan, run
from ip2p_ray.stages.progress import Progress
from ip2p_ray.training.loop import TrainConfig, start, train
from ip2p_ray.training.state import TrainState

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
ATTEMPTS = 3
"""How often training is begun in one run, when workers or nodes are lost."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What every worker is told."""

    config: TrainConfig
    generator: str
    """Where training starts."""
    latents: str
    checkpoints: str
    """Folder of the checkpoints and of METRICS, absolute: workers run in folders of their own."""
    editor: str
    """Folder that the finished editor is exported to."""
    editing: EditSettings
    report_every: int
    """Optimizer steps between two reports, each with a checkpoint."""


def train_editor(
    latents: str,
    folder: str,
    config: TrainConfig,
    *,
    generator: str,
    editing: EditSettings,
    models: Mapping[str, str],
    resources: run.Resources,
) -> storage.Manifest:
    """The folders `<folder>/checkpoints` and `<folder>/editor`, a diffusers folder.

    `resources.actors` workers train with DistributedDataParallel; batch_size is not used. An
    editor that was deleted since is exported again without training.

    Raises:
        Ip2pError: as `training.loop.train` and `load_checkpoint`; no attempt is repeated for it.
    """
    root = storage.local_path(folder).absolute()
    checkpoints = root / "checkpoints"
    told = TrainingRun(
        config=config,
        generator=generator,
        latents=str(storage.local_path(latents).absolute()),
        checkpoints=str(checkpoints),
        editor=str(root / "editor"),
        editing=editing,
        report_every=-(-config.steps // 12),
    )
    origin = run.Origin(
        dataset="checkpoints",
        config={**asdict(config), "editing": asdict(editing)},
        models={"generator": models["generator"]},
        sources={"latents": storage.read_manifest(latents).recipe},
    )
    manifest = run.make(str(checkpoints), origin, lambda: _fit(told, resources))
    if not (root / "editor" / "model_index.json").is_file():
        logger.info("training: the editor is gone; exporting it again from the newest checkpoint")
        model, state = _restored(told, "cpu")
        if state.step < config.steps:
            raise StageError(
                f"training: {checkpoints} has lost its last checkpoint and {told.editor} is gone; "
                f"delete {checkpoints} to train again"
            )
        export_editor(model, state.ema, told.editor, asdict(editing))
    return manifest


def read_metrics(checkpoints: str | Path) -> list[dict[str, Any]]:
    """What the run measured: `training.loop.Metrics` as dictionaries, one for each report.

    The loss is the mean since the report before.
    """
    return [json.loads(line) for line in _noted(checkpoints)]


def _fit(told: TrainingRun, resources: run.Resources) -> list[Report]:
    found = latest_checkpoint(told.checkpoints)
    already = int(found.name.removeprefix("step-")) if found else 0
    progress = Progress("training", total=told.config.steps, unit="steps", done=already)
    with plan.counted(progress) as tally:
        persist(lambda: _train_in_workers(told, resources, tally))
    return []


def persist(work: Callable[[], object], attempts: int = ATTEMPTS) -> None:
    """Does the work, and again where Ray Train lost a worker or a node, `attempts` times at most.

    Not Ray's own FailureConfig, which repeats whatever is raised. An error of this package would
    only be raised again, so it is raised at once. Any other may be that of a worker that misses
    a lost one, and is taken for it.
    """
    for left in reversed(range(attempts)):
        try:
            work()
            return
        except ray.train.TrainingFailedError as error:
            told = run.own_error(error)
            if told is not None:
                raise told from error
            if not left:
                raise
            reason = str(error).splitlines()[-1]
            logger.warning("training: goes on at the newest checkpoint after a failure: %s", reason)


def _train_in_workers(told: TrainingRun, resources: run.Resources, tally: Any) -> None:
    scratch = Path(told.checkpoints) / ".ray"
    worker = {"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})}
    # What Ray Train keeps of earlier attempts would only make it return their old metrics.
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        TorchTrainer(
            train_on_worker,
            train_loop_config={"told": told, "tally": tally},
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.actors,
                use_gpu=resources.gpus > 0,
                resources_per_worker=worker,
            ),
            run_config=ray.train.RunConfig(name="editor", storage_path=str(scratch)),
            torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def train_on_worker(arguments: Mapping[str, Any]) -> None:
    """What each worker of the trainer runs; rank 0 saves, and exports the editor at the end."""
    told: TrainingRun = arguments["told"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    model, state = _restored(told, get_device())
    dataset = LatentDataset(told.latents)
    if rank == 0:
        _forget_after(told.checkpoints, state.step)
    steps = train(
        model,
        dataset,
        told.config,
        rank=rank,
        world_size=world_size,
        wrap=_parallel if world_size > 1 else None,
        state=state,
    )
    losses: list[float] = []
    for metrics in steps:
        losses.append(metrics.loss)
        if rank == 0:
            arguments["tally"].add.remote(1)
        if metrics.step % told.report_every == 0 or metrics.step == told.config.steps:
            noted = {**asdict(metrics), "loss": fmean(losses)}
            losses.clear()
            if rank == 0:
                _save(told.checkpoints, state, noted)
            ray.train.report(noted)
    if rank == 0:
        export_editor(model, state.ema, told.editor, asdict(told.editing))
    if world_size > 1:
        torch.distributed.barrier()


def _parallel(unet: torch.nn.Module) -> torch.nn.Module:
    wrapped: torch.nn.Module = prepare_model(unet, move_to_device=False)
    return wrapped


def _restored(told: TrainingRun, device: str | torch.device) -> tuple[StableDiffusion, TrainState]:
    """The model and the state of the newest checkpoint, or of the start where there is none."""
    model = StableDiffusion.load(told.generator, device=device)
    state = start(model, told.config)
    found = latest_checkpoint(told.checkpoints)
    if found is not None:
        load_checkpoint(found, state)
    return model, state


def _save(checkpoints: str, state: TrainState, metrics: Mapping[str, float]) -> None:
    """Notes what was measured, then saves the checkpoint.

    In this order no kill leaves a checkpoint without its line. A line without its checkpoint is
    dropped by `_forget_after`, and its steps are taken and measured again.
    """
    path = Path(checkpoints) / METRICS
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    sync(path)
    save_checkpoint(checkpoints, state)


def _forget_after(checkpoints: str, step: int) -> None:
    """Drops the notes of steps that are taken again, and a line that was cut by a kill."""
    kept = [line for line in _noted(checkpoints) if json.loads(line)["step"] <= step]
    storage.write_bytes(Path(checkpoints) / METRICS, "".join(kept).encode())


def _noted(checkpoints: str | Path) -> list[str]:
    """The lines of METRICS, without one whose end was cut off."""
    path = Path(checkpoints) / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]
