"""Measure parts of the flow beside what they are compared with; no network.

python jobs/benchmark.py options --prompts 20 --candidates 24 --json options.json
python jobs/benchmark.py triplets --actors 2 --concurrency 32 --json triplets.json
python jobs/benchmark.py triplets --captions 100000 --delay 0
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.benchmark import options_job, triplets
from ip2p_ray.command import loading

BENCHMARKS = {"options": options_job, "triplets": triplets}
"""By subcommand: a module whose `Options` are its flags and whose `run` returns the table."""


def main(job: options_job.Options | triplets.Options) -> int:
    """Run one benchmark; returns the exit status."""
    [name] = [name for name, module in BENCHMARKS.items() if isinstance(job, module.Options)]
    os.environ.setdefault("TQDM_DISABLE", "1")
    if getattr(job, "preset", None) == "miniature":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with loading(name):
        from ip2p_ray.errors import Ip2pError

        if name != "triplets":
            import transformers

            transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ip2p_ray").setLevel(logging.INFO)
    try:
        print(BENCHMARKS[name].run(job))
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    except (Ip2pError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with loading("benchmark"):
        import tyro

        chosen = tyro.extras.subcommand_cli_from_dict(
            {name: module.Options for name, module in BENCHMARKS.items()}
        )
    sys.exit(main(chosen))
