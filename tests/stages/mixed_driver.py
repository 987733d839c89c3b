"""What the test of a mixed pool runs: generators with a GPU and without on a Ray that claims one.

Each generator writes where it would compute to a file of its own name.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pyarrow as pa

from ip2p_ray.filtering import Thresholds
from ip2p_ray.generator import Holding
from ip2p_ray.pairs import PairConfig
from ip2p_ray.stages import run, starting
from ip2p_ray.stages.pair_actors import held_here
from ip2p_ray.stages.pairs import Making, generate_pairs
from ip2p_ray.testing.pairs import DrawingJudge, Sleep, SleepingGenerator, models, write_triplets

CONFIG = PairConfig(candidates=4, keep=2, thresholds=Thresholds(text=0.1, image=0.1, direction=0.1))


class Placed(SleepingGenerator):
    """Tells where it is, waits until all three do, and sleeps."""

    def __init__(self, *, holding: Holding, **arguments: object) -> None:
        super().__init__(**arguments)
        (Path(os.environ["PLACED"]) / f"{os.getpid()}.device").write_text(held_here(holding).device)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """See `SleepingGenerator`."""
        ends = time.monotonic() + 300  # two that are quick could do all before the third is there
        while len(list(Path(os.environ["PLACED"]).glob("*.device"))) < 3:
            assert time.monotonic() < ends, "not all three generators have begun"
            time.sleep(0.1)
        yield from super().__call__(batch)


def main(folder: Path) -> None:
    """The stage with one generator that holds a GPU and two that do not."""
    write_triplets(str(folder / "triplets"), 24)
    making = Making(
        generator=Sleep(seconds=0.1),
        judge="drawing",
        holding=Holding(device="cuda", batch_size=CONFIG.candidates),
        generators=run.Resources(gpus=1, cpus=0.5, cpu_actors=2, cpu_actor_cpus=0.5),
        judges=run.Resources(cpus=0.25, batch_size=32),
    )
    starting.start(
        local=True,
        address="local",
        num_cpus=4,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
    )
    generate_pairs(
        str(folder / "triplets"),
        str(folder),
        CONFIG,
        making,
        models=models(),
        actors=(Placed, DrawingJudge),
    )


if __name__ == "__main__":
    os.environ["PLACED"] = sys.argv[1]
    main(Path(sys.argv[1]))
