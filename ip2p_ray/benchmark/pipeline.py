"""`jobs/benchmark.py pipeline`: what Ray costs the making of pairs; heavy imports wait."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ip2p_ray.atomic import atomic_file
from ip2p_ray.command import require_place

SIMULATED = (1, 2, 4)
"""Generators that sleep instead of computing."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What Ray costs the pairs: workers that sleep, the miniature beside a bare loop, memory."""

    triplets: int = 64
    """For each sleeping worker."""
    seconds: float = 1.0
    """That a worker sleeps for a triplet."""
    real: int = 48
    """Triplets that the miniature's generator makes, in the stage and in a bare loop; 0 is none."""
    many: int = 0
    """Triplets that go through workers which neither sleep nor compute, to see the memory."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if min(self.triplets, self.real + 1, self.many + 1) < 1 or not self.seconds > 0:
            raise ValueError(
                "--triplets is at least 1, --real and --many at least 0, --seconds above 0"
            )
        if self.json is not None:
            require_place("--json", self.json, folder=False)


def run(job: Options) -> str:
    """A line for each figure; the JSON file is written."""
    import torch

    import ip2p_ray.stages.overhead  # noqa: F401 - loads Ray Data, which sets up its own logging
    from ip2p_ray.benchmark.measure import LIBRARIES, facts
    from ip2p_ray.stages.run import local_ray

    found: dict[str, Any] = facts(torch.device("cpu"), (*LIBRARIES, "ray"))
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder, local_ray(workers=max(SIMULATED)):
        place = Path(folder)
        found["sleeping"] = [_sleeping(job, place, workers, lines) for workers in SIMULATED]
        if job.real:
            found["real"] = _real(job, place, lines)
        if job.many:
            found["many"] = _many(job, place, lines)
    if job.json is not None:
        with atomic_file(job.json) as new:
            new.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return "\n".join(f"pipeline: {line}" for line in lines)


def _sleeping(job: Options, place: Path, workers: int, lines: list[str]) -> dict[str, Any]:
    from ip2p_ray.generator import Holding
    from ip2p_ray.stages.overhead import piped
    from ip2p_ray.stages.pairs import Making
    from ip2p_ray.stages.run import Resources
    from ip2p_ray.testing.pairs import Sleep, models, write_triplets

    config, actors = _fakes()
    triplets, folder = str(place / f"triplets-{workers}"), place / f"sleeping-{workers}"
    count = job.triplets * workers
    write_triplets(triplets, count)
    making = Making(
        generator=Sleep(seconds=job.seconds / config.candidates),
        judge="drawing",
        holding=Holding(batch_size=config.candidates),
        generators=Resources(actors=workers, cpus=0.25),
        judges=Resources(cpus=0.25, batch_size=32),
    )
    span = piped(triplets, str(folder), config, making, models=models(), actors=actors)
    ideal = job.triplets * job.seconds
    lines.append(
        f"{workers} sleeping workers: {count} triplets in {span.seconds:.1f} s, ideally "
        f"{ideal:.1f}: efficiency {ideal / span.seconds:.3f}; {span.wall_seconds:.1f} s in all"
    )
    return {"workers": workers, "efficiency": ideal / span.seconds, **asdict(span)}


def _real(job: Options, place: Path, lines: list[str]) -> dict[str, Any]:
    from ip2p_ray import presets
    from ip2p_ray.generator import GeneratorWeights
    from ip2p_ray.miniature.scores import edit_tasks
    from ip2p_ray.stages.overhead import bare, piped
    from ip2p_ray.stages.pairs import Making
    from ip2p_ray.testing.pairs import dataset_of

    preset = presets.miniature()
    texts = [
        (task.caption, task.instruction, task.edited_caption) for task in edit_tasks(job.real, 0)
    ]
    triplets = str(place / "real-triplets")
    dataset_of(triplets, texts)
    making = Making(generator=GeneratorWeights(source=preset.generator), judge=preset.judge)
    config = replace(preset.pairs, candidates=making.holding.batch_size)
    models = presets.fingerprints(preset)
    spans = {}
    for turn in range(2):  # in turns, for the machine may not be as quick all the time
        loop, stage = place / f"bare-{turn}", place / f"stage-{turn}"
        loop.mkdir()
        spans[f"bare_{turn}"] = bare(triplets, str(loop), config, making)
        spans[f"stage_{turn}"] = piped(triplets, str(stage), config, making, models=models)
    rates = {
        kind: sum(spans[f"{kind}_{turn}"].triplets for turn in range(2))
        / sum(spans[f"{kind}_{turn}"].seconds for turn in range(2))
        for kind in ("bare", "stage")
    }
    overhead = rates["bare"] / rates["stage"] - 1
    lines.append(
        f"miniature: {rates['stage'] * config.candidates:.2f} candidates/s in the stage, "
        f"{rates['bare'] * config.candidates:.2f} in a bare loop: Ray costs {100 * overhead:.1f} %"
    )
    return {"overhead": overhead, **{name: asdict(span) for name, span in spans.items()}}


def _many(job: Options, place: Path, lines: list[str]) -> dict[str, Any]:
    from ip2p_ray.generator import Holding
    from ip2p_ray.stages.memory import memory_line, peak_memory
    from ip2p_ray.stages.overhead import piped
    from ip2p_ray.stages.pairs import Making
    from ip2p_ray.stages.run import Resources
    from ip2p_ray.testing.pairs import Sleep, models, write_triplets

    config, actors = _fakes()
    found = []
    for count in (job.many // 10, job.many):
        triplets, folder = str(place / f"many-{count}"), place / f"made-{count}"
        write_triplets(triplets, count)
        making = Making(
            generator=Sleep(),
            judge="drawing",
            holding=Holding(batch_size=16 * config.candidates),
            generators=Resources(actors=2, cpus=0.25),
            judges=Resources(cpus=0.25, batch_size=32),
        )
        with peak_memory(every_s=0.5) as peak:
            span = piped(triplets, str(folder), config, making, models=models(), actors=actors)
        found.append({"triplets": count, **peak, "seconds": span.wall_seconds})
        lines.append(
            f"{count:,} triplets that cost nothing: {span.wall_seconds:.0f} s, at most "
            f"{memory_line(peak)}"
        )
    return {"runs": found}


def _fakes() -> tuple[Any, tuple[type, type]]:
    from ip2p_ray.filtering import Thresholds
    from ip2p_ray.pairs import PairConfig
    from ip2p_ray.testing.pairs import DrawingJudge, SleepingGenerator

    limits = Thresholds(text=0.1, image=0.1, direction=0.1)
    config = PairConfig(candidates=4, keep=2, thresholds=limits)
    return config, (SleepingGenerator, DrawingJudge)
