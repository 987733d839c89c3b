"""What the test of the metrics runs: the flow on small models, and replies of an endpoint.

It says where its Ray shows the metrics, and ends when it is told to.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import ray

from ip2p_ray import presets
from ip2p_ray.evaluation import EvaluationConfig
from ip2p_ray.stages import run
from ip2p_ray.stages.flow import make_datasets
from ip2p_ray.stages.replies import Asking
from ip2p_ray.stages.triplets import ask_triplets
from ip2p_ray.triplets.endpoint import Endpoint
from ip2p_ray.triplets.limits import LimitsConfig
from ip2p_ray.triplets.writer import WriterConfig


def main(weights: str, folder: str, endpoint: str) -> None:
    """The flow in the folder, replies in <folder>/asked."""
    preset = presets.miniature(Path(weights))
    preset = replace(
        preset,
        pairs=replace(preset.pairs, keep=1),  # so that candidates are rejected
        training=replace(preset.training, steps=9, batch_size=4),
    )
    questions = EvaluationConfig(tasks=3, shown=2, curve_tasks=2, image_guidance_scales=(1.0, 1.5))
    asking = Asking(
        journal=f"{folder}/asked/journal",
        endpoint=Endpoint(base_url=endpoint, api_key_env=None, backoff_s=0.01),
        limits=LimitsConfig(
            usd_per_million_prompt_tokens=1000.0, usd_per_million_completion_tokens=2000.0
        ),
    )
    with run.locked(folder), run.local_ray(workers=2):
        say(port=ray.nodes()[0]["MetricsExportPort"])
        make_datasets(folder, preset, questions, captions=10, seed=0, workers=2)
        ask_triplets(
            f"{folder}/captions",
            f"{folder}/asked",
            WriterConfig(model="fake", shots=0),
            examples=(),
            asking=asking,
        )
        say(done=True)
        sys.stdin.readline()


def say(**what: object) -> None:
    """A line for the test."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run.guarded("driver", lambda: main(*sys.argv[1:])))
