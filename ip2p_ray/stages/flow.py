"""The whole flow on the miniature's models, top to bottom; jobs/quickstart.py runs it."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from ip2p_ray import presets, storage
from ip2p_ray.errors import ConfigError
from ip2p_ray.evaluation import EvaluationConfig
from ip2p_ray.generator import GeneratorWeights
from ip2p_ray.miniature.scores import random_captions
from ip2p_ray.miniature.weights import WEIGHTS
from ip2p_ray.report import duration
from ip2p_ray.stages.captions import collect_captions
from ip2p_ray.stages.evaluation import Answerers, evaluate_editor
from ip2p_ray.stages.latents import encode_latents
from ip2p_ray.stages.pairs import Making, generate_pairs
from ip2p_ray.stages.report import Written, edit_command, shown, write_report
from ip2p_ray.stages.run import Resources, local_ray, locked
from ip2p_ray.stages.training import train_editor
from ip2p_ray.stages.triplets import TripletConfig, write_triplets

logger = logging.getLogger(__name__)

# --smoke: the most of each that is made.
SMOKE_CAPTIONS, SMOKE_CANDIDATES, SMOKE_STEPS = 16, 2, 16
SMOKE_QUESTIONS = EvaluationConfig(
    tasks=8, shown=4, curve_tasks=2, image_guidance_scales=(1.0, 1.5, 2.0)
)


def run_all(
    *,
    out: str,
    seed: int,
    captions: int,
    candidates: int,
    train_steps: int,
    workers: int,
    smoke: bool,
    weights: Path | None,
) -> Written:
    """Everything from captions to the report, in the folder `out`; what is there is not redone.

    Raises:
        Ip2pError: with a sentence for whoever typed the command.
    """
    began = time.monotonic()
    questions = replace(SMOKE_QUESTIONS if smoke else EvaluationConfig(), seed=seed)
    if smoke:
        captions = min(captions, SMOKE_CAPTIONS)
        candidates = min(candidates, SMOKE_CANDIDATES)
        train_steps = min(train_steps, SMOKE_STEPS)
    preset = presets.miniature(weights or WEIGHTS)
    preset = replace(
        preset,
        pairs=replace(preset.pairs, candidates=candidates),
        training=replace(preset.training, steps=train_steps, seed=seed),
    )
    out = storage.absolute(out)
    with locked(out), local_ray(workers=workers):
        make_datasets(out, preset, questions, captions=captions, seed=seed, workers=workers)
        written = write_report(out, questions, seed=seed)
    logger.info("done in %s", duration(time.monotonic() - began))
    logger.info("look at %s; the scores are in %s", shown(written.report), shown(written.metrics))
    logger.info("edit a picture: %s", edit_command(out, written))
    return written


def make_datasets(
    folder: str,
    preset: presets.Preset,
    questions: EvaluationConfig,
    *,
    captions: int,
    seed: int,
    workers: int,
) -> None:
    """Every dataset of the flow, the checkpoints and the editor, in the folder."""
    models = presets.fingerprints(preset)
    if preset.writer is None or preset.shipped is None:
        raise ConfigError(f"preset {preset.name} has no local writer or no shipped editor")

    def actors(batch_size: int, most: int = workers) -> Resources:
        return Resources(actors=min(most, workers), batch_size=batch_size)

    logger.info("1 of 6: captions of scenes that are not held out")
    collect_captions(
        random_captions(captions, seed),
        f"{folder}/captions",
        config={"source": "miniature", "count": captions, "seed": seed},
    )
    logger.info("2 of 6: triplets; a language model writes an edit of each caption")
    write_triplets(
        f"{folder}/captions",
        folder,
        TripletConfig(seed=seed),
        writer=preset.writer,
        judge=preset.judge,
        models=models,
        resources=actors(16, most=1),
    )
    logger.info("3 of 6: pairs; %d candidates of each triplet", preset.pairs.candidates)
    generate_pairs(
        f"{folder}/triplets",
        folder,
        preset.pairs,
        Making(
            generator=GeneratorWeights(source=preset.generator),
            judge=preset.judge,
            generators=actors(8),
        ),
        models=models,
    )
    logger.info("4 of 6: latents of the pairs that were kept")
    encode_latents(
        f"{folder}/pairs",
        f"{folder}/latents",
        generator=preset.generator,
        models=models,
        resources=actors(32, most=1),
    )
    logger.info("5 of 6: training of the editor, %d steps", preset.training.steps)
    ranks = _ranks(preset.training.batch_size, workers)
    trained = train_editor(
        f"{folder}/latents",
        folder,
        preset.training,
        generator=preset.generator,
        editing=preset.editing,
        models=models,
        resources=Resources(actors=ranks, cpus=1.0),
    )
    logger.info("6 of 6: evaluation on %d edits of held-out scenes", questions.tasks)
    answerers = Answerers(
        editor=f"{folder}/editor",
        shipped=preset.shipped,
        generator=preset.generator,
        editing=preset.editing,
    )
    evaluate_editor(
        folder,
        questions,
        answerers=answerers,
        judge=preset.judge,
        models=models,
        trained=trained,
        resources=actors(12),
    )


def _ranks(batch_size: int, workers: int) -> int:
    """The most workers, up to `workers`, that a batch splits over evenly."""
    return max(count for count in range(1, workers + 1) if batch_size % count == 0)
