"""`jobs/benchmark.py editor`: the flags and the files; heavy imports wait for `run`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ip2p_ray.atomic import atomic_file
from ip2p_ray.benchmark.config import EditorBenchmark
from ip2p_ray.command import require_place


@dataclass(frozen=True, kw_only=True)
class Options(EditorBenchmark):
    """The service: our engine beside requests one by one and batches of whole requests."""

    json: Path | None = None
    """Where the figures go as JSON, besides the table."""
    plot: Path | None = None
    """Where latency and throughput against the rate go, as one HTML file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("json", "plot"):
            place = getattr(self, name)
            if place is not None:
                require_place(f"--{name}", place, folder=False)


def run(job: Options) -> str:
    """The table; the files are written.

    Raises:
        Ip2pError: a model or a device cannot be used, or the service does not start.
    """
    # Ray would say so with a line of its own
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ip2p_ray.benchmark.load_page import load_page, table
    from serve.benchmark_run import compare

    asked = {field.name: getattr(job, field.name) for field in fields(EditorBenchmark)}
    found: dict[str, Any] = compare(EditorBenchmark(**asked))
    if job.json is not None:
        with atomic_file(job.json) as new:
            new.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if job.plot is not None:
        with atomic_file(job.plot) as new:
            new.write_text(load_page(found), encoding="utf-8")
    return table(found)
