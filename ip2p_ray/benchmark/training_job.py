"""`jobs/benchmark.py training`: the flags and the JSON; heavy imports wait for `run`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ip2p_ray.atomic import atomic_file
from ip2p_ray.benchmark.config import TrainingBenchmark
from ip2p_ray.command import require_place


@dataclass(frozen=True, kw_only=True)
class Options(TrainingBenchmark):
    """Training: our loop beside the plain way, in turns, with the same model and batch."""

    json: Path | None = None
    """Where the figures go as JSON, besides the table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json is not None:
            require_place("--json", self.json, folder=False)


def run(job: Options) -> str:
    """The table; the JSON file is written.

    Raises:
        Ip2pError: a preset, a model or a device cannot be used.
    """
    from ip2p_ray.benchmark.training import compare, table

    asked = {field.name: getattr(job, field.name) for field in fields(TrainingBenchmark)}
    found: dict[str, Any] = compare(TrainingBenchmark(**asked))
    if job.json is not None:
        with atomic_file(job.json) as new:
            new.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return table(found)
