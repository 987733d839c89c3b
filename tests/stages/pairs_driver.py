"""What the crash test runs and kills: the pairs stage with its fakes, on the Ray of RAY_ADDRESS."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from ip2p_ray.filtering import Thresholds
from ip2p_ray.generator import Holding
from ip2p_ray.pairs import PairConfig
from ip2p_ray.stages import run
from ip2p_ray.stages.pairs import Making, generate_pairs
from ip2p_ray.testing.pairs import DrawingJudge, Sleep, SleepingGenerator, models

CONFIG = PairConfig(candidates=4, keep=2, thresholds=Thresholds(text=0.1, image=0.1, direction=0.1))


def main(triplets: str, folder: str, actors: int, seconds: float, log: str) -> None:
    """The stage with so many generators, each taking so long for a triplet."""
    making = Making(
        generator=Sleep(seconds=seconds / CONFIG.candidates, log=log),
        judge="drawing",
        holding=Holding(batch_size=CONFIG.candidates),
        generators=run.Resources(actors=actors, cpus=0.5),
        judges=run.Resources(cpus=0.25, batch_size=32),
        part_triplets=int(os.environ.get("PART_TRIPLETS", "24")),
    )
    with run.locked(folder), run.local_ray(workers=actors):
        generate_pairs(
            triplets,
            folder,
            CONFIG,
            making,
            models=models(),
            actors=(SleepingGenerator, DrawingJudge),
        )


if __name__ == "__main__":
    triplets, first, actors, seconds, log, *others = sys.argv[1:]

    def work() -> None:
        for folder in (first, *others):
            main(triplets, folder, int(actors), float(seconds), log)

    sys.exit(run.guarded("driver", work))
