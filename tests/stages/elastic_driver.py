"""What the test of elastic training runs: one worker or two, on the Ray of RAY_ADDRESS."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from dataclasses import replace

from ip2p_ray import presets
from ip2p_ray.stages import run, training
from ip2p_ray.stages.training_run import Carried, Source
from ip2p_ray.storage import absolute


def main(weights: Path, latents: str, folder: Path, steps: int) -> None:
    """Trains, and looks every few seconds whether a node has joined."""
    training.RESIZE_EVERY_S = 5.0
    preset = presets.miniature(weights)
    config = replace(preset.training, steps=steps, batch_size=4)
    with run.local_ray(workers=2):
        training.train_editor(
            Source(uri=absolute(latents)),
            str(folder),
            config,
            generator=preset.generator,
            editing=preset.editing,
            models={"generator": "tiny"},
            resources=run.Resources(actors=1, most_actors=2, cpus=1.0),
            carried=Carried(micro_batch=4, save_every=10, log_every=1),
        )


if __name__ == "__main__":
    weights, latents, folder, steps = sys.argv[1:]
    done = run.guarded("driver", lambda: main(Path(weights), latents, Path(folder), int(steps)))
    sys.exit(done)
