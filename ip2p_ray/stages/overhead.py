"""What Ray costs the pairs stage: how busy its generators are, how much memory the driver takes.

Each generator notes when it began and ended a triplet; starting Ray and loading models is told
apart. Made for `jobs/benchmark.py pipeline`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from ip2p_ray import storage
from ip2p_ray.pairs import PairConfig
from ip2p_ray.schema import TRIPLETS
from ip2p_ray.stages.pair_actors import GenerateCandidates, JudgeCandidates
from ip2p_ray.stages.pairs import Making, generate_pairs


@dataclass(frozen=True, kw_only=True)
class Span:
    """What generators noted of one run."""

    triplets: int
    seconds: float
    """From the beginning of the first triplet to the end of the last."""
    busy: float
    """Share of that time, in [0, 1], that the generators were at work."""
    wall_seconds: float
    """Of the whole run, with the start of the actors and all that follows."""


def noted(generator: type, log: str) -> type:
    """The class of a generator, such as GenerateCandidates, that notes its times in the file."""

    class Noted:
        def __init__(self, **arguments: Any) -> None:
            self._made = generator(**arguments)

        def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
            began = time.time()
            for table in self._made(batch):
                with Path(log).open("a") as file:  # one short write: lines do not mix
                    file.write(json.dumps([began, time.time()]) + "\n")
                yield table
                began = time.time()

    return Noted


def piped(
    triplets: str,
    folder: str,
    config: PairConfig,
    making: Making,
    *,
    models: dict[str, str],
    actors: tuple[type, type] = (GenerateCandidates, JudgeCandidates),
) -> Span:
    """The stage from triplets to pairs, in a folder that has none yet."""
    log = Path(folder) / "times.jsonl"
    began = time.monotonic()
    watched = (noted(actors[0], str(log)), actors[1])
    generate_pairs(triplets, folder, config, making, models=models, actors=watched)
    return span(log, making.generators.actors, time.monotonic() - began)


def bare(triplets: str, folder: str, config: PairConfig, making: Making) -> Span:
    """The same candidates by one generator in a loop of its own process, without a judge."""
    task: Any = ray.remote(**making.generators.of_task)(_loop)
    log = Path(folder) / "bare.jsonl"
    began = time.monotonic()
    ray.get(task.remote(triplets, str(log), config, making))
    return span(log, 1, time.monotonic() - began)


def _loop(triplets: str, log: str, config: PairConfig, making: Making) -> None:
    generator = noted(GenerateCandidates, log)(
        weights=making.generator, holding=making.holding, config=config, recipe="bare"
    )
    rows = storage.read_dataset(triplets, TRIPLETS)
    each = max(1, making.holding.batch_size // config.candidates)
    for start in range(0, len(rows), each):
        for _ in generator(rows.slice(start, each)):
            pass


def span(log: Path, actors: int, wall_seconds: float) -> Span:
    """What the file of `noted` says of a run of so many generators."""
    times = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    seconds = max(ended for _, ended in times) - min(began for began, _ in times)
    worked = sum(ended - began for began, ended in times)
    return Span(
        triplets=len(times),
        seconds=seconds,
        busy=worked / (actors * seconds),
        wall_seconds=wall_seconds,
    )
