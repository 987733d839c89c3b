"""What the test of the metrics runs: small stages with small models, and an endpoint that fails.

It says where its Ray shows the metrics, and ends when it is told to.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import ray

from ip2p_ray import presets
from ip2p_ray.generator import GeneratorWeights
from ip2p_ray.miniature.scores import random_captions
from ip2p_ray.stages import run
from ip2p_ray.stages.captions import collect_captions
from ip2p_ray.stages.latents import encode_latents
from ip2p_ray.stages.pairs import Making, generate_pairs
from ip2p_ray.stages.replies import Asking
from ip2p_ray.stages.training import train_editor
from ip2p_ray.stages.triplets import ask_triplets
from ip2p_ray.triplets.endpoint import Endpoint
from ip2p_ray.triplets.limits import LimitsConfig
from ip2p_ray.triplets.writer import WriterConfig


def main(weights: str, folder: str, endpoint: str) -> None:
    """From captions to an editor, in the folder."""
    preset = presets.miniature(Path(weights))
    models = presets.fingerprints(preset)
    pairs = replace(preset.pairs, candidates=2, keep=1)  # so that candidates are rejected
    training = replace(preset.training, steps=9, batch_size=4)
    asking = Asking(
        journal=f"{folder}/journal",
        endpoint=Endpoint(base_url=endpoint, api_key_env=None, backoff_s=0.01),
        limits=LimitsConfig(
            usd_per_million_prompt_tokens=1000.0, usd_per_million_completion_tokens=2000.0
        ),
    )
    with run.locked(folder), run.local_ray(workers=1):
        say(port=ray.nodes()[0]["MetricsExportPort"])
        collect_captions(random_captions(10, 0), f"{folder}/captions", config={"count": 10})
        ask_triplets(
            f"{folder}/captions",
            folder,
            WriterConfig(model="fake", shots=0),
            examples=(),
            asking=asking,
        )
        making = Making(generator=GeneratorWeights(source=preset.generator), judge=preset.judge)
        generate_pairs(f"{folder}/triplets", folder, pairs, making, models=models)
        encode_latents(
            f"{folder}/pairs",
            f"{folder}/latents",
            generator=preset.generator,
            models=models,
            resources=run.Resources(),
        )
        train_editor(
            f"{folder}/latents",
            folder,
            training,
            generator=preset.generator,
            editing=preset.editing,
            models=models,
            resources=run.Resources(),
        )
        say(done=True)
        sys.stdin.readline()


def say(**what: object) -> None:
    """A line for the test."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run.guarded("driver", lambda: main(*sys.argv[1:])))
