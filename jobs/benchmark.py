"""How fast the parts are, each beside what it is compared with in the same run; no network.

    python jobs/benchmark.py triplets --actors 2 --concurrency 32 --json triplets.json
    python jobs/benchmark.py triplets --captions 100000 --delay 0
    python jobs/benchmark.py pairs --json pairs.json
    python jobs/benchmark.py pairs --sd15 --preset paper --steps 25 --device cuda --dtype bfloat16
    python jobs/benchmark.py options --prompts 20 --candidates 24
    python jobs/benchmark.py pipeline
    python jobs/benchmark.py training --ranks 2 --json training.json
    python jobs/benchmark.py training --sd15 --device cuda --bf16 --batch-size 64
    python jobs/benchmark.py editor --json editor.json --plot editor.html
    python jobs/benchmark.py editor --sd15 --device cuda --dtype float16
    python jobs/benchmark.py scale --rows 10000000 --json scale.json
    ray job submit --working-dir . --entrypoint-num-gpus 1 -- python jobs/benchmark.py pairs \
        --sd15 --device cuda --dtype bfloat16 --json /shared/pairs.json

`triplets` writes triplets of made-up captions against the shipped server, which answers after
--delay seconds. `pairs` makes the same candidates in the reference's way and in ours. `options`
tells what each option of the search saves and loses. `pipeline` is what Ray costs the pairs.
`training` takes the same optimizer steps the plain way and in our loop. `editor` loads the service
with requests, its engine beside a pipeline that takes them one by one or in batches. `scale` tells
what grows with the rows, shards and objects; cluster/SCALE.md is made of it.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.benchmark import options_job, pairs_job, pipeline, scale, training_job, triplets
from ip2p_ray.command import loading
from serve import benchmark as editor_job

BENCHMARKS: dict[str, Any] = {
    "triplets": triplets,
    "pairs": pairs_job,
    "options": options_job,
    "pipeline": pipeline,
    "training": training_job,
    "editor": editor_job,
    "scale": scale,
}
"""By subcommand: a module whose `Options` are its flags and whose `run` returns the table."""


def main(job: Any) -> int:
    """Run one benchmark and print its table; returns the exit status."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    if getattr(job, "preset", None) == "miniature" or getattr(job, "sd15", False):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    [measure] = [found for found in BENCHMARKS.values() if type(job) is found.Options]
    with loading("benchmark"):
        from ip2p_ray.errors import Ip2pError
    logging.basicConfig(level=logging.WARNING, format="benchmark: %(message)s")
    logging.getLogger("ip2p_ray").setLevel(logging.INFO)
    try:
        print(measure.run(job))
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
            {name: found.Options for name, found in BENCHMARKS.items()},
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    sys.exit(main(asked))
