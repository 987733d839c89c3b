"""latents (or pairs) -> checkpoints -> editor: the training loop in Ray Train's workers.

Checkpoints are this package's own (`checkpoint`): a run that was killed, or that lost a worker,
goes on at the newest whole one, whatever Ray had heard of it. What a worker does is in
`training_worker`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from ip2p_ray import logs, storage
from ip2p_ray.checkpoint import set_aside_broken
from ip2p_ray.copies import local_folder, room_for_dataset
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import EditSettings
from ip2p_ray.errors import ConfigError, StageError
from ip2p_ray.latents import LatentDataset
from ip2p_ray.memory import free_bytes, held_bytes
from ip2p_ray.mirror import fetch_newest
from ip2p_ray.report import Report, size
from ip2p_ray.stages import attempts, metrics, run
from ip2p_ray.stages.progress import Progress, shown
from ip2p_ray.stages.training_run import (
    INDEX,
    METRICS,
    Carried,
    Source,
    TrainingRun,
    export,
    forget_here,
    noted_lines,
    restored,
)
from ip2p_ray.stages.training_worker import Board, train_on_worker
from ip2p_ray.training.loop import TrainConfig
from ip2p_ray.training.memory import MemoryPlan, memory_plan

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often training is begun without having got any further, when workers or nodes are lost."""

RESIZE_EVERY_S = 60.0
"""How often an elastic run looks whether nodes have joined; its workers are then begun anew, at the
newest checkpoint."""


def train_editor(
    source: str | Source,
    folder: str,
    config: TrainConfig,
    *,
    generator: str,
    editing: EditSettings,
    models: dict[str, str] | Any,
    resources: run.Resources,
    carried: Carried | None = None,
) -> storage.Manifest:
    """The folders `<folder>/checkpoints` and `<folder>/editor`, a diffusers folder.

    `folder` is one that all nodes reach, or s3://... (`training_run`).
    `source` is a dataset of latents, or of pairs (Source.resolution). `generator` is what training
    starts from: one that takes an image already is trained further. `resources.actors` workers
    train with DistributedDataParallel, up to `most_actors` where the cluster has room now and
    then; batch_size is not used. Another number of workers goes on with the same run. An editor
    that was deleted since is exported again without training.

    Raises:
        Ip2pError: as `training.loop.train` and `load_checkpoint`; no attempt is repeated for it.
    """
    source = source if isinstance(source, Source) else Source(uri=source)
    source = replace(source, uri=storage.absolute(source.uri))
    carried = carried or Carried()
    manifest = storage.read_manifest(source.uri)
    given = {key: value for key, value in asdict(config).items() if value or key != "lora_rank"}
    cut = {} if source.resolution is None else {"resolution": source.resolution}
    origin = run.Origin(
        dataset="checkpoints",
        config={**given, **cut, "editing": asdict(editing)},
        models={"generator": models["generator"]},
        sources={"latents" if source.resolution is None else "pairs": manifest.recipe},
    )
    encoded_by = manifest.models.get("generator")
    if source.resolution is None and encoded_by not in (None, models["generator"]):
        logger.warning(
            "training: the latents were encoded by other weights than training starts from; its "
            "autoencoder and text encoder have to be those that encoded"
        )
    told = TrainingRun(
        config=config,
        generator=generator,
        fingerprint=models["generator"],
        recipe=origin.digest,
        source=source,
        data={"dataset": manifest.dataset, "rows": manifest.rows, "recipe": manifest.recipe},
        out=storage.absolute(folder),
        editing=editing,
        carried=carried,
    )
    if told.in_bucket:
        _require_no_disk(carried)
    made = run.make(told.checkpoints, origin, lambda: _fit(told, resources))
    if not storage.exists(storage.join(told.editor, INDEX)):
        logger.info("training: the editor is gone; exporting it again from the newest checkpoint")
        model, state = restored(told, "cpu")
        if state.step < config.steps:
            raise StageError(
                f"training: {told.checkpoints} has lost its last checkpoint and {told.editor} is "
                f"gone; delete {told.checkpoints} to train again"
            )
        export(told, model, state)
        forget_here(told)
    return made


def _require_no_disk(carried: Carried) -> None:
    """Raises: ConfigError, for what cannot go with a run in a bucket."""
    if carried.mirror is not None:
        raise ConfigError("--mirror is for an --out on a disk; s3://... has every checkpoint")
    if "mlflow" in carried.sinks:
        raise ConfigError("--metrics mlflow keeps notes on a disk: give an --out there")


def read_metrics(checkpoints: str | Path) -> list[dict[str, Any]]:
    """What the run measured: `training.loop.Metrics` as dictionaries, one for each report.

    The loss is the mean since the report before.
    """
    return [json.loads(line) for line in noted_lines(checkpoints)]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a worker would find."""

    fingerprint: str
    """Of the model that training starts from."""
    memory: MemoryPlan
    free: int
    """Bytes of the device, or of the machine's memory, that are free."""
    device: str
    """Its name."""

    def require_room(self, sharing: int = 1) -> None:
        """Returns if `sharing` workers fit where one was surveyed.

        Raises:
            StageError: they do not; says the need and what there is, and what to change.
        """
        need = sharing * self.memory.need
        if need > self.free:
            each = f"{sharing} workers" if sharing > 1 else "a worker"
            raise StageError(
                f"training: {each} on {self.device} would need {size(need)}, {size(self.free)} "
                "are free: take a smaller --micro-batch, --gradient-checkpointing True, "
                "--bf16 True or --lora-rank"
            )


def copy_line(source: Source, resources: run.Resources) -> str:
    """What the copies of data in a bucket take of a node's disk, as a worker's node has it.

    Raises:
        StageError: there is not so much; says the need and what there is.
    """
    need, free, where = run.in_task(resources, room_for_dataset, source.uri, source.cache)
    if need > free:
        raise StageError(
            f"training: a copy of {source.uri} and what is mapped of it need {size(need)} in "
            f"{where} of every node, {size(free)} are free: give another --cache"
        )
    return f"each node keeps a copy of {source.uri} in {where}: {size(need)} of {size(free)} free"


def survey(
    source: Source,
    config: TrainConfig,
    *,
    generator: str,
    resources: run.Resources,
    micro_batch: int,
) -> Survey:
    """The survey of `train_editor` with the same arguments, made where a worker would be.

    Raises:
        ModelError: the model cannot be loaded.
        DatasetError: the data are not whole.
    """
    found: Survey = run.in_task(
        resources, _survey, source, config, generator, resources, micro_batch
    )
    return found


def _survey(
    source: Source, config: TrainConfig, generator: str, resources: run.Resources, micro_batch: int
) -> Survey:
    model = StableDiffusion.load(local_folder(generator, source.cache))
    data = source.open(model)
    if isinstance(data, LatentDataset):
        data.require_model(model)
    _, *latent = data.shape
    plan = memory_plan(
        model.unet,
        config,
        latent=(latent[0], latent[1]),
        text=(model.text_length, int(model.unet.config["cross_attention_dim"])),
        micro_batch=micro_batch,
        frozen=held_bytes(model.vae, model.text_encoder),
        accumulates=config.batch_size > micro_batch * resources.actors,
        encoder=None if source.resolution is None else model.vae,
        workers=resources.most_actors or resources.actors,
        device="cuda" if resources.gpus else "cpu",
    )
    name = torch.cuda.get_device_name() if resources.gpus else "this machine"
    free = free_bytes("cuda" if resources.gpus else "cpu")
    return Survey(fingerprint=model.fingerprint(), memory=plan, free=free, device=name)


def sharing_workers(resources: run.Resources) -> int:
    """How many workers at least share the device, or the machine, that one of them finds."""
    workers = resources.most_actors or resources.actors
    if resources.gpus:
        return min(workers, max(1, int(1 / resources.gpus)))
    return -(-workers // max(1, run.nodes_for(resources)))


def _fit(told: TrainingRun, resources: run.Resources) -> list[Report]:
    if told.in_bucket:
        if told.newest_step:
            logger.info("training: goes on from step %d of %s", told.newest_step, told.checkpoints)
    else:
        _mend(told)
    progress = TrainingProgress(
        "training", total=told.config.steps, unit="steps", done=told.newest_step
    )
    with _watched(progress) as board:
        persist(lambda: _train_in_workers(told, resources, board), reached=lambda: told.newest_step)
    if told.newest_step < told.config.steps:
        raise StageError(f"training: the workers left no last checkpoint in {told.checkpoints}")
    progress.update(told.config.steps)
    metrics.progressed(attempts.reached())
    return []


def _mend(told: TrainingRun) -> None:
    """What a disk lost of the checkpoints is set aside, and comes from the mirror if it can."""
    for broken in set_aside_broken(told.checkpoints):
        logger.warning("training: %s is broken and set aside; goes on at the one before", broken)
    mirror = told.carried.mirror
    if mirror is not None:
        fetched = fetch_newest(mirror, Path(told.checkpoints), beside=METRICS, recipe=told.recipe)
        if fetched is not None:
            logger.info("training: goes on from %s of %s", fetched.name, mirror)


def persist(
    work: Callable[[], object],
    attempts: int = ATTEMPTS,
    *,
    reached: Callable[[], int] = lambda: 0,
) -> None:
    """Does the work, and again where Ray Train lost a worker or a node.

    `attempts` times at most without getting any further than before, by what `reached` says. Not
    Ray's own FailureConfig, which repeats whatever is raised. An error of this package would only
    be raised again, so it is raised at once. Any other may be that of a worker that misses a lost
    one, and is taken for it.
    """
    left, before = attempts, reached()
    while True:
        try:
            work()
            return
        except ray.train.TrainingFailedError as error:
            told = run.own_error(error)
            if told is not None:
                raise told from error
            now = reached()
            left = attempts - 1 if now > before else left - 1
            before = now
            if not left:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[-1]
            logger.warning("training: goes on at the newest checkpoint after a failure: %s", reason)


def _train_in_workers(told: TrainingRun, resources: run.Resources, board: Any) -> None:
    most = resources.most_actors or resources.actors
    scaling: dict[str, Any] = {"num_workers": most}
    if most > resources.actors:
        scaling = {
            "num_workers": (resources.actors, most),
            "elastic_resize_monitor_interval_s": RESIZE_EVERY_S,
        }
    if most > told.config.batch_size:
        raise ConfigError(
            f"{most} workers cannot share a batch of {told.config.batch_size} samples"
        )
    # What Ray Train keeps of earlier attempts would only make it return their old metrics.
    shutil.rmtree(told.ray, ignore_errors=True)
    try:
        TorchTrainer(
            train_on_worker,
            train_loop_config={"told": told, "board": board, "about": logs.names()},
            scaling_config=ray.train.ScalingConfig(
                use_gpu=resources.gpus > 0,
                resources_per_worker=resources.of_worker,
                **scaling,
            ),
            run_config=ray.train.RunConfig(name="editor", storage_path=str(told.ray)),
            torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        ).fit()
    finally:
        shutil.rmtree(told.ray, ignore_errors=True)


class TrainingProgress(Progress):
    """Also tells what the first worker measured last."""

    measured = ""

    def line(self) -> str:
        """As that of Progress, with loss, images a second and memory."""
        text = super().line()
        return f"{text}; {self.measured}" if self.measured else text


@contextmanager
def _watched(progress: TrainingProgress) -> Iterator[Any]:
    """An actor that the first worker tells its step, shown while the block runs."""
    board = run.beside_driver(Board).remote()
    asked: list[Any] = []
    warned = 0

    def poll() -> int:
        nonlocal warned
        metrics.progressed(attempts.reached())
        if not asked:
            asked.append(board.read.remote())
        if ray.wait(asked, timeout=0)[0]:
            try:
                step, progress.measured, warnings = ray.get(asked.pop())
            except ray.exceptions.RayActorError:
                return progress.done
            for text in warnings[warned:]:
                logger.warning("training: %s", text)
            warned = len(warnings)
            return max(step, progress.done)
        return progress.done

    try:
        with shown(progress, poll):
            yield board
    finally:
        ray.kill(board)
