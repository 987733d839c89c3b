"""How fast the parts are, each beside what it is compared with in the same run; no network.

    python jobs/benchmark.py triplets --actors 2 --concurrency 32 --json triplets.json
    python jobs/benchmark.py triplets --captions 100000 --delay 0
    python jobs/benchmark.py pairs --json pairs.json
    python jobs/benchmark.py pairs --sd15 --preset paper --steps 25 --device cuda --dtype bfloat16
    python jobs/benchmark.py options --prompts 20 --candidates 24
    python jobs/benchmark.py pipeline

`triplets` writes triplets of made-up captions against the shipped server, which answers after
--delay seconds. `pairs` makes the same candidates in the reference's way and in ours. `options`
tells what each option of the search saves and loses. `pipeline` is what Ray costs the pairs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.atomic import atomic_file
from ip2p_ray.benchmark import options_job
from ip2p_ray.benchmark import pipeline as pipeline_job
from ip2p_ray.benchmark.config import PairBenchmark
from ip2p_ray.benchmark.triplets import TripletsBenchmark
from ip2p_ray.command import loading, require_place


@dataclass(frozen=True, kw_only=True)
class Triplets(TripletsBenchmark):
    """Replies a second of a server that answers after a while, and what they cost."""

    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json is not None:
            require_place("--json", self.json, folder=False)


def triplets(job: Triplets) -> str:
    """The stage of triplets against the shipped server."""
    from ip2p_ray.benchmark.triplets import lines, measure

    found = measure(job, Path(__file__).with_name("write_triplets.py"))
    write(job.json, found)
    return "\n".join(f"triplets: {line}" for line in lines(found))


@dataclass(frozen=True, kw_only=True)
class Pairs(PairBenchmark):
    """Making pairs: our generator beside the reference's way, in turns, on the same candidates."""

    json: Path | None = None
    """File for the figures, beside the table that is printed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json is not None:
            require_place("--json", self.json, folder=False)


def pairs(job: Pairs) -> str:
    """The same candidates in the reference's way and in ours."""
    if job.preset == "miniature" or job.sd15:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from ip2p_ray.benchmark.pairs import compare, table

    found: dict[str, Any] = compare(job)
    write(job.json, found)
    return table(found)


def pipeline(job: pipeline_job.Pipeline) -> str:
    """The stage of pairs with sleeping workers, beside a bare loop, and with many triplets."""
    found, table = pipeline_job.run(job)
    write(job.json, found)
    return table


def write(path: Path | None, found: dict[str, Any]) -> None:
    """The figures as JSON, where a file was asked for."""
    if path is not None:
        with atomic_file(path) as new:
            new.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


BENCHMARKS: dict[str, tuple[type, Callable[[Any], str]]] = {
    "triplets": (Triplets, triplets),
    "pairs": (Pairs, pairs),
    "options": (options_job.Options, options_job.run),
    "pipeline": (pipeline_job.Pipeline, pipeline),
}
"""By subcommand: its flags, and what measures and returns the table."""


def main(job: Any) -> int:
    """Measure and print the table; returns the exit status."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    with loading("benchmark"):
        from ip2p_ray.errors import Ip2pError
    logging.basicConfig(level=logging.WARNING, format="benchmark: %(message)s")
    logging.getLogger("ip2p_ray").setLevel(logging.INFO)
    measure = next(found for flags, found in BENCHMARKS.values() if type(job) is flags)
    try:
        print(measure(job))
    except KeyboardInterrupt:
        print("benchmark: stopped", file=sys.stderr)
        return 130
    except (Ip2pError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with loading("benchmark"):
        import tyro

        asked = tyro.extras.subcommand_cli_from_dict(
            {name: flags for name, (flags, _) in BENCHMARKS.items()},
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    sys.exit(main(asked))
