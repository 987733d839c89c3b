"""The paper's ablations on the miniature: filtering, the number of pairs, dropout, the two scales.

    python jobs/measure_findings.py --out runs/findings
    ray job submit --working-dir . -- python jobs/measure_findings.py --out /shared/findings

A pool of candidates is made as jobs/quickstart.py makes pairs, with nothing filtered; then editors
are trained on choices from it and scored by the oracle, one after the other on one core.
<out>/findings.json has means with intervals. The same command again goes on where it was stopped,
at most one editor later. The status is 0 when all is made, 1 for a failure, 2 for a wrong flag.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import loading, require_place


@dataclass(frozen=True, kw_only=True)
class MeasureFindings:
    """Candidates in a pool, editors trained on choices from it, and their scores."""

    out: Path = Path("runs/findings")
    """Folder for everything that is made."""
    captions: int = 1200
    """Captions to begin with, each with one triplet."""
    candidates: int = 3
    """Candidates of each triplet."""
    steps: int = 300
    """Optimizer steps of every editor."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of training and of what is drawn; an editor each for every arm."""
    tasks: int = 128
    """Held-out scenes that every editor is asked."""
    grid_tasks: int = 48
    """The first of them, asked at every pair of scales."""
    workers: int = 2
    """Processes that make the pool."""

    def __post_init__(self) -> None:
        for name in ("captions", "candidates", "steps", "tasks", "grid_tasks", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        if not self.seeds:
            raise ValueError("--seeds needs a number")
        require_place("--out", self.out, folder=True)


def main(job: MeasureFindings) -> int:
    """Measure, or what is left of it; returns the exit status."""
    with loading("measure_findings"):
        from ip2p_ray.stages import run
    return run.guarded("measure_findings", lambda: _measure(job))


def _measure(job: MeasureFindings) -> None:
    from ip2p_ray import presets
    from ip2p_ray.benchmark.findings import FindingsConfig, make_pool, measure_findings
    from ip2p_ray.stages import run

    out = job.out.absolute()
    preset = presets.miniature()
    config = FindingsConfig(
        seeds=job.seeds, steps=job.steps, tasks=job.tasks, grid_tasks=job.grid_tasks
    )
    with run.locked(out):
        with run.ray_to_make(str(out / "pool" / "pairs"), workers=job.workers):
            pool = make_pool(
                str(out / "pool"),
                preset,
                captions=job.captions,
                candidates=job.candidates,
                workers=job.workers,
            )
        found = measure_findings(pool, out, config, preset)
    for arm, told in found["arms"].items():
        right = told["correct"]
        print(
            f"measure_findings: {arm}: {told['pairs']['pairs']:,} pairs, forced choice "
            f"{right['mean']:.3f} ({right['low']:.3f} to {right['high']:.3f})"
        )
    print(f"measure_findings: see {job.out}/findings.json")


if __name__ == "__main__":
    with loading("measure_findings"):
        import tyro

        asked = tyro.cli(MeasureFindings)
    sys.exit(main(asked))
