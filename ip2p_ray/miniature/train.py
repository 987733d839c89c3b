"""Train the whole miniature from nothing.

    python -m ip2p_ray.miniature.train --out FOLDER

Autoencoder, judge (with the text encoder), writer, generator, the pairs it makes, the editor from
them, and the scores of all: hours on two CPU cores, minutes on a GPU. Rerun the same command to go
on after a stop. The result, FOLDER/weights, is what ip2p_ray/miniature/weights holds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from ip2p_ray.clip import Clip
from ip2p_ray.miniature import autoencoder, editing, generator, judge, writer
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
    threads: int = 2
    """CPU threads."""
    autoencoder: autoencoder.AutoencoderConfig = field(
        default_factory=autoencoder.AutoencoderConfig
    )
    judge: judge.JudgeConfig = field(default_factory=judge.JudgeConfig)
    writer: writer.WriterConfig = field(default_factory=writer.WriterConfig)
    generator: generator.GeneratorConfig = field(default_factory=generator.GeneratorConfig)
    editing: editing.EditingConfig = field(default_factory=editing.EditingConfig)


def main(job: TrainMiniature) -> None:
    """Every step in order; a step whose record is there is not done again."""
    torch.set_num_threads(job.threads)
    out, seed, device = job.out, job.seed, job.device
    out.mkdir(parents=True, exist_ok=True)

    def pairs() -> dict[str, Any]:
        calibration = calibrate(Clip.load(out / "judge", device), seed=seed)
        models = editing.load_models(out, device)
        editing.make_pairs(models, job.editing, calibration.thresholds, out, seed=seed)
        return {**asdict(calibration), "funnel": editing.pair_funnel(out)}

    def editor() -> dict[str, Any]:
        return editing.train_editor(job.editing, out, EDITOR_SETTINGS, seed=seed, device=device)

    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "autoencoder": lambda: autoencoder.train(job.autoencoder, out, seed=seed, device=device),
        "decoder": lambda: autoencoder.train_decoder(
            job.autoencoder, out, seed=seed, device=device
        ),
        "judge": lambda: judge.train(job.judge, out, seed=seed, device=device),
        "writer": lambda: writer.train(job.writer, out, seed=seed, device=device),
        "generator": lambda: generator.train(job.generator, out, seed=seed, device=device),
        "pairs": pairs,
        "editor": editor,
        "scores": lambda: score(out, seed=seed, device=device),
    }
    for name, step in steps.items():
        _once(out / "records" / f"{name}.json", step)
    ship(out, job.editing, command=_command(job))
    logger.info("done: %s", out / "weights")


def _once(record: Path, step: Callable[[], dict[str, Any]]) -> None:
    """Run the step unless its record says that it was done; the record is written last."""
    if record.exists():
        logger.info("%s: done before", record.stem)
        return
    began = time.monotonic()
    result = step()
    content = {"wall_seconds": round(time.monotonic() - began, 1), **result}
    record.parent.mkdir(exist_ok=True)
    temporary = record.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(record)
    logger.info("%s: %s", record.stem, content)


def _command(job: TrainMiniature) -> str:
    return (
        f"python -m ip2p_ray.miniature.train --out FOLDER --seed {job.seed} --device {job.device}"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(TrainMiniature))
