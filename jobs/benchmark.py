"""How fast this is, measured beside what it is compared with; only --json is written.

python jobs/benchmark.py pairs
python jobs/benchmark.py pairs --sd15 --preset paper --steps 25 --device cuda --dtype bfloat16
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.benchmark.config import PairBenchmark
from ip2p_ray.command import loading, require_place


@dataclass(frozen=True, kw_only=True)
class Pairs(PairBenchmark):
    """Making pairs: our generator beside the reference's way, in turns, on the same candidates."""

    json: Path | None = None
    """Where the result goes as JSON, beside the table that is printed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json is not None:
            require_place("--json", self.json, folder=False)


COMMANDS = {"pairs": Pairs}
"""By the name of the subcommand."""


def main(job: Pairs) -> int:
    """Measure, print the table and write the JSON; returns the exit status."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    if job.preset == "miniature" or job.sd15:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.basicConfig(level=logging.WARNING, format="benchmark: %(message)s")
    logging.getLogger("ip2p_ray").setLevel(logging.INFO)
    with loading("benchmark"):
        from ip2p_ray.atomic import atomic_file
        from ip2p_ray.benchmark.pairs import compare, table
        from ip2p_ray.errors import Ip2pError
    try:
        result: dict[str, Any] = compare(job)
        print(table(result))
        if job.json is not None:
            with atomic_file(job.json) as new:
                new.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
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
            COMMANDS, config=(tyro.conf.FlagCreatePairsOff,), description=__doc__
        )
    sys.exit(main(asked))
