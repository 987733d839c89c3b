"""Train the whole miniature from nothing.

    python -m ip2p_ray.miniature.train --out FOLDER --processes 2
    python -m ip2p_ray.miniature.train --out FOLDER --device cuda

Autoencoder, judge (with the text encoder), writer, generator, the pairs it makes, the editor from
them, and the scores of all: hours on two CPU cores, minutes on a GPU. Rerun the same command to go
on after a stop. The result, FOLDER/weights, is what ip2p_ray/miniature/weights holds.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from ip2p_ray.atomic import atomic_file
from ip2p_ray.clip import Clip
from ip2p_ray.command import require_place
from ip2p_ray.errors import ConfigError, Ip2pError, StageError
from ip2p_ray.filtering import Thresholds
from ip2p_ray.miniature import autoencoder, editing, generator, judge, parallel, writer
from ip2p_ray.miniature.calibration import calibrate
from ip2p_ray.miniature.shipping import EDITOR_SETTINGS, score, ship

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainMiniature:
    """What `python -m ip2p_ray.miniature.train` takes."""

    out: Path
    """Folder of states, models and, in the end, weights/."""
    seed: int = 0
    device: str = "cpu"
    """cpu or cuda."""
    processes: int = 1
    """CPU processes that share the batches of all trainings but the judge's. Another number is
    another random stream, so another model of the same quality."""
    threads: int = 1
    """CPU threads of each process."""
    calibration_pairs: int = 2_000
    """Drawn pairs of each kind that the thresholds are calibrated on."""
    tasks: int = 256
    """Held-out edits that the editor is scored on."""
    autoencoder: autoencoder.AutoencoderConfig = field(
        default_factory=autoencoder.AutoencoderConfig
    )
    judge: judge.JudgeConfig = field(default_factory=judge.JudgeConfig)
    writer: writer.WriterConfig = field(default_factory=writer.WriterConfig)
    generator: generator.GeneratorConfig = field(default_factory=generator.GeneratorConfig)
    editing: editing.EditingConfig = field(default_factory=editing.EditingConfig)

    def __post_init__(self) -> None:
        for name in ("processes", "threads", "calibration_pairs", "tasks"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is at least 1, got {getattr(self, name)}")
        for name in ("autoencoder", "writer", "generator", "editing"):
            size = getattr(self, name).batch_size
            if size % self.processes:
                raise ConfigError(
                    f"--{name}.batch-size {size} does not split over {self.processes} processes"
                )
        require_place("--out", self.out, folder=True)


SETTINGS = "settings.json"
"""What FOLDER was begun with."""

ONLY_HOW = ("out", "device", "processes", "threads")
"""Fields that a rerun may change."""


def main(job: TrainMiniature) -> None:
    """Every step in order; a step whose record is there is not done again.

    Raises:
        ConfigError: the folder was begun with other settings, or the device is not there or not
            for several processes.
    """
    _check_device(job)
    job.out.mkdir(parents=True, exist_ok=True)
    _same_settings(job)
    parallel.run(job.processes, train, job)


def train(job: TrainMiniature) -> None:
    """What each process does."""
    torch.set_num_threads(job.threads)
    if not parallel.rank():
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out, seed, device = job.out, job.seed, job.device

    def calibrated() -> dict[str, Any]:
        clip = Clip.load(out / "judge", device)
        return asdict(calibrate(clip, seed=seed, count=job.calibration_pairs))

    def pairs() -> dict[str, Any]:
        found = json.loads((out / "records" / "calibration.json").read_text(encoding="utf-8"))
        models = editing.load_models(out, device)
        thresholds = Thresholds(**found["thresholds"])
        editing.make_pairs(models, job.editing, thresholds, out, seed=seed)
        parallel.meet()
        funnel = editing.pair_funnel(out)
        if not funnel.get("kept"):
            raise StageError(f"no candidate was kept, so there is nothing to train on: {funnel}")
        return {"funnel": funnel}

    def editor() -> dict[str, Any]:
        return editing.train_editor(job.editing, out, EDITOR_SETTINGS, seed=seed, device=device)

    def told(step: Any, config: Any) -> Callable[[], dict[str, Any]]:
        return lambda: step(config, out, seed=seed, device=device)

    _once(out, "autoencoder", device, told(autoencoder.train, job.autoencoder))
    _once(out, "decoder", device, told(autoencoder.train_decoder, job.autoencoder))
    _once(out, "judge", device, _first_alone(told(judge.train, job.judge)))
    _once(out, "writer", device, told(writer.train, job.writer))
    _once(out, "generator", device, told(generator.train, job.generator))
    _once(out, "calibration", device, _first_alone(calibrated))
    _once(out, "pairs", device, pairs)
    _once(out, "editor", device, editor)
    scored = partial(score, out, job.editing, seed=seed, tasks=job.tasks, device=device)
    _once(out, "scores", device, _first_alone(scored))
    if not parallel.rank():
        ship(out, job.editing, command=command(job))
        logger.info("done: %s", out / "weights")


def _check_device(job: TrainMiniature) -> None:
    if job.device == "cpu":
        return
    if job.processes > 1:
        raise ConfigError(f"--processes {job.processes} are for the CPU, got --device {job.device}")
    if not (job.device.startswith("cuda") and torch.cuda.is_available()):
        raise ConfigError(f"--device {job.device}: there is no such device here")


def _same_settings(job: TrainMiniature) -> None:
    """Notes the settings in the folder, or compares them with those noted."""
    path = job.out / SETTINGS
    now = json.loads(json.dumps({k: v for k, v in asdict(job).items() if k not in ONLY_HOW}))
    if not path.exists():
        _write(path, now)
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give another --out") from error
    if before != now:
        names = dict.fromkeys([*now, *before])
        changed = ", ".join(name for name in names if before.get(name) != now.get(name))
        raise ConfigError(
            f"{job.out} was begun with another {changed} ({path}): give another --out"
        )


def _first_alone(step: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The step in the first process only, the others wait."""
    return lambda: {} if parallel.rank() else step()


def _once(out: Path, name: str, device: str, step: Callable[[], dict[str, Any]]) -> None:
    """Run the step unless its record says that it was done; the record is written last."""
    record = out / "records" / f"{name}.json"
    if parallel.agreed(record.exists()):
        logger.info("%s: done before", name)
        return
    began = time.monotonic()
    result = step()
    parallel.meet()
    if not parallel.rank():
        spent = round(time.monotonic() - began, 1)
        content = {"wall_seconds": spent, "device": _device(device), **result}
        record.parent.mkdir(exist_ok=True)
        _write(record, content)
        logger.info("%s: %s", name, content)
    parallel.meet()


def _write(path: Path, content: Any) -> None:
    with atomic_file(path) as new:
        new.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def _device(device: str) -> str:
    """For the model card, such as "x86_64 CPU, 2 processes of 1 thread"."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    processes = f"{parallel.count()} processes of " if parallel.count() > 1 else ""
    return f"{platform.machine()} CPU, {processes}{threads}"


def command(job: TrainMiniature) -> str:
    """What to type to train the same again."""
    flags = [f"--seed {job.seed}", *_changed("", job, TrainMiniature(out=job.out))]
    return f"python -m ip2p_ray.miniature.train --out FOLDER {' '.join(flags)}"


def _changed(prefix: str, config: Any, default: Any) -> list[str]:
    """Flags of the fields that differ from their defaults."""
    flags = []
    for name in (prefix + one.name for one in fields(config)):
        value, usual = (getattr(c, name.removeprefix(prefix)) for c in (config, default))
        if value == usual or name == "seed":
            continue
        if is_dataclass(value):
            flags += _changed(f"{name}.", value, usual)
        else:
            words = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags.append(f"--{name.replace('_', '-')} {words}")
    return flags


if __name__ == "__main__":
    try:
        main(tyro.cli(TrainMiniature))
    except Ip2pError as error:
        sys.exit(f"train: {error}")
