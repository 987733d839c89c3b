"""What the tests of several nodes run: a stage in pools of nodes, on the Ray of RAY_ADDRESS."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from ip2p_ray import presets
from ip2p_ray.filtering import Thresholds
from ip2p_ray.generator import Holding
from ip2p_ray.pairs import PairConfig
from ip2p_ray.stages import latents, run, training
from ip2p_ray.stages.pairs import Making, generate_pairs
from ip2p_ray.stages.training_run import Carried, Source
from ip2p_ray.testing.pairs import DrawingJudge, Sleep, SleepingGenerator, models

CONFIG = PairConfig(candidates=4, keep=2, thresholds=Thresholds(text=0.1, image=0.1, direction=0.1))


def generate(triplets: str, folder: str, seconds: str, log: str) -> None:
    """Two generators that sleep, in their pool, and a judge that draws in its own."""
    making = Making(
        generator=Sleep(seconds=float(seconds) / CONFIG.candidates, log=log),
        judge="drawing",
        holding=Holding(batch_size=CONFIG.candidates),
        generators=run.Resources(actors=2, cpus=0.5, custom=(("generator", 1.0),)),
        judges=run.Resources(cpus=0.25, batch_size=32, custom=(("clip", 1.0),)),
    )
    with run.local_ray(workers=2, actors=making.actors):
        generate_pairs(
            triplets,
            folder,
            CONFIG,
            making,
            models=models(),
            actors=(SleepingGenerator, DrawingJudge),
        )


def encode(pairs: str, uri: str, generator: str) -> None:
    """One autoencoder in the generators' pool, measured there before."""
    resources = run.Resources(cpus=0.5, batch_size=4, custom=(("generator", 1.0),))
    asked = {"generator": generator, "encoding": latents.Encoding(), "resources": resources}
    with run.local_ray(workers=1, actors=[resources]):
        latents.plan_of(pairs, Path(uri).parent, **asked)
        latents.encode_latents(pairs, uri, models={"generator": "tiny"}, **asked)


def train(source: str, folder: str, weights: str, steps: str, pool: str = "trainer") -> None:
    """Two workers in the trainers' pool."""
    preset = presets.miniature(Path(weights))
    config = replace(preset.training, steps=int(steps), batch_size=4)
    resources = run.Resources(actors=2, cpus=1.0, custom=((pool, 1.0),))
    data = Source(uri=source)
    with run.local_ray(workers=2, actors=[resources]):
        training.survey(
            data, config, generator=preset.generator, resources=resources, micro_batch=2
        )
        training.train_editor(
            data,
            folder,
            config,
            generator=preset.generator,
            editing=preset.editing,
            models={"generator": "tiny"},
            resources=resources,
            carried=Carried(micro_batch=2, save_every=20, log_every=1),
        )


if __name__ == "__main__":
    stage, *arguments = sys.argv[1:]
    stages = {"generate": generate, "encode": encode, "train": train}
    sys.exit(run.guarded("driver", lambda: stages[stage](*arguments)))
