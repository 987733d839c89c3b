"""How fast the parts are on this machine, and what they cost.

    python jobs/benchmark.py triplets --actors 2 --concurrency 32 --json triplets.json
    python jobs/benchmark.py triplets --captions 100000 --delay 0

`triplets` writes triplets of made-up captions against the shipped server, which answers after
--delay seconds: replies a second, CPU time a reply, and the memory of each kind of process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.atomic import atomic_file
from ip2p_ray.benchmark.triplets import TripletsBenchmark, lines, measure
from ip2p_ray.command import require_place


@dataclass(frozen=True, kw_only=True)
class Triplets(TripletsBenchmark):
    """What the stage of triplets is measured with."""

    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json is not None:
            require_place("--json", self.json, folder=False)


def triplets(job: Triplets) -> int:
    """Replies a second of a server that answers after a while, and what they cost."""
    from ip2p_ray.stages import run

    def work() -> None:
        found = measure(job, Path(__file__).with_name("write_triplets.py"))
        for line in lines(found):
            print(f"triplets: {line}")
        if job.json is not None:
            with atomic_file(job.json) as new:
                new.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    return run.guarded("benchmark", work)


if __name__ == "__main__":
    import tyro

    app = tyro.extras.SubcommandApp()
    app.command(name="triplets")(triplets)
    sys.exit(app.cli(config=(tyro.conf.OmitArgPrefixes,)))
