"""The paper's ablations on the miniature: what filtering, more pairs, and dropout buy an editor.

jobs/measure_findings.py runs it.

Every arm trains editors on another choice from one pool of candidates, all with the same steps,
batch and seeds, and the oracle scores them on the same held-out scenes. Source: paper section 4.2
and appendix A (ablations of the data and of conditioning dropout).

    <out>/latents.parquet      the pool, encoded once
    <out>/<arm>-<seed>/        the editor, and scores-<digest>.json, a row an answer

Whatever is there is not made again, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_ray import parquet, storage
from ip2p_ray.answerers import EditorAnswerer
from ip2p_ray.atomic import atomic_file
from ip2p_ray.checkpoint import export_editor
from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import Thresholds, select
from ip2p_ray.generator import GeneratorWeights
from ip2p_ray.images import decode_image
from ip2p_ray.intervals import BootstrapConfig, Estimate, difference, estimate
from ip2p_ray.latents import LatentDataset, encode_pairs
from ip2p_ray.measures import Measurer, Shown
from ip2p_ray.miniature import scores
from ip2p_ray.presets import Preset, fingerprints
from ip2p_ray.schema import LATENTS, PAIRS, recipe
from ip2p_ray.stages.captions import collect_captions
from ip2p_ray.stages.pairs import Making, generate_pairs
from ip2p_ray.stages.run import Resources
from ip2p_ray.stages.trial_tasks import DRAWN, TaskSource, task_rows
from ip2p_ray.stages.triplets import TripletConfig, write_triplets
from ip2p_ray.training.loop import start, train
from ip2p_ray.trials import TrialConfig

logger = logging.getLogger(__name__)

TOLD = ("correct", "preservation_error", "direction_similarity", "image_similarity")
"""Measures that a finding is told in."""

_ENCODED = 32


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to choose pairs and to train on them."""

    name: str
    chosen: Literal["filtered", "random"] = "filtered"
    """Candidates that pass the thresholds, or as many of all, drawn at random."""
    share: float = 1.0
    """Of the triplets, in (0, 1]; those of a smaller share are among those of a larger."""
    dropout: float = 0.05
    """Of the conditions, each; 0 is none."""


ARMS = (
    Arm(name="filtered"),
    Arm(name="random", chosen="random"),
    Arm(name="filtered-30", share=0.3),
    Arm(name="filtered-10", share=0.1),
    Arm(name="no-dropout", dropout=0.0),
)


@dataclass(frozen=True, kw_only=True)
class FindingsConfig:
    """How much is trained and asked."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of training and of what is drawn; an editor each for every arm."""
    steps: int = 400
    """Optimizer steps of every editor."""
    tasks: int = 128
    """Held-out scenes with an edit, the same for everyone."""
    grid_tasks: int = 48
    """The first of them, asked at every pair of scales."""
    text_guidance_scales: tuple[float, ...] = (1.0, 2.0, 5.0)
    image_guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.2)
    grid_arms: tuple[str, ...] = ("filtered", "no-dropout")
    """Arms that are asked at every pair of scales."""

    def trials(self, arm: Arm) -> TrialConfig:
        """At what an arm's editors answer."""
        return TrialConfig(
            curve_tasks=self.grid_tasks if arm.name in self.grid_arms else 0,
            text_guidance_scales=self.text_guidance_scales,
            image_guidance_scales=self.image_guidance_scales,
        )


def make_pool(folder: str, preset: Preset, *, captions: int, candidates: int, workers: int) -> str:
    """The pairs dataset `<folder>/pairs` in which every candidate is kept; needs a Ray."""
    everything = Thresholds(text=-1.0, image=-1.0, direction=-1.0)
    config = replace(preset.pairs, candidates=candidates, keep=candidates, thresholds=everything)
    if preset.writer is None:
        raise ConfigError(f"preset {preset.name} has no local writer")
    models = fingerprints(preset)
    collect_captions(
        scores.random_captions(captions, 0),
        f"{folder}/captions",
        config={"source": "miniature", "count": captions, "seed": 0},
    )
    write_triplets(
        f"{folder}/captions",
        folder,
        TripletConfig(seed=0),
        writer=preset.writer,
        judge=preset.judge,
        models=models,
        resources=Resources(actors=1, batch_size=16),
    )
    making = Making(
        generator=GeneratorWeights(source=preset.generator),
        judge=preset.judge,
        generators=Resources(actors=workers, batch_size=8),
    )
    generate_pairs(f"{folder}/triplets", folder, config, making, models=models)
    return f"{folder}/pairs"


def measure_findings(
    pool: str, out: Path, config: FindingsConfig, preset: Preset
) -> dict[str, Any]:
    """What `<out>/findings.json` holds: means with intervals by arm, differences, and scales.

    `pool` is a pairs dataset whose thresholds let every candidate through.

    Raises:
        ConfigError: the pool was filtered.
    """
    encoded = _encode_pool(pool, out, preset)
    for seed in config.seeds:
        for arm in ARMS:
            _make(arm, seed, encoded, out, config, preset)
    rows = {
        arm.name: [
            {**row, "seed": seed}
            for seed in config.seeds
            for row in json.loads(_scores_file(arm, seed, out, config).read_text("utf-8"))
        ]
        for arm in ARMS
    }
    counts = {arm.name: _counts(_chosen(encoded, arm, 0, preset)) for arm in ARMS}
    found = summary(rows, counts, BootstrapConfig())
    found["config"] = asdict(config)
    told = json.dumps(found, indent=2, allow_nan=False) + "\n"
    storage.write_bytes(out / "findings.json", told.encode())
    return found


def summary(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    counts: Mapping[str, Mapping[str, int]],
    config: BootstrapConfig,
) -> dict[str, Any]:
    """By arm its means at the usual scales, and the others' differences to the first arm.

    Answers to one task, whatever the seed, are one group; `by_seed` shows how much seeds differ,
    which three of them are too few to put into an interval.
    """
    first = next(iter(rows))
    usual = {arm: [row for row in own if row["usual"]] for arm, own in rows.items()}
    found: dict[str, Any] = {"arms": {}, "differences_to_first": {}, "scales": {}}
    for arm, own in usual.items():
        found["arms"][arm] = {
            "pairs": counts[arm],
            **{name: _told(estimate(*_values(own, name), config)) for name in TOLD},
            "by_seed": {
                name: [
                    float(np.mean([row[name] for row in own if row["seed"] == seed]))
                    for seed in sorted({row["seed"] for row in own})
                ]
                for name in TOLD
            },
        }
        if arm != first:
            found["differences_to_first"][arm] = {
                name: _told(
                    difference(
                        _keyed(own, name),
                        _keyed(usual[first], name),
                        {f"{row['task_key']}/{row['seed']}": row["task_key"] for row in own},
                        config,
                    )
                )
                for name in TOLD
            }
    for arm, everything in rows.items():
        if any(not row["usual"] for row in everything):
            found["scales"][arm] = _scales(everything, config)
    return found


def _scales(own: Sequence[Mapping[str, Any]], config: BootstrapConfig) -> list[dict[str, Any]]:
    """Means at every pair of scales, over the tasks that were asked at all of them."""
    asked = {row["task_key"] for row in own if not row["usual"]}
    pairs = sorted(
        {
            (row["text_guidance_scale"], row["image_guidance_scale"])
            for row in own
            if row["task_key"] in asked
        }
    )
    told = []
    for text, image in pairs:
        some = [
            row
            for row in own
            if row["task_key"] in asked
            and (row["text_guidance_scale"], row["image_guidance_scale"]) == (text, image)
        ]
        means = {name: _told(estimate(*_values(some, name), config)) for name in TOLD}
        told.append({"text_guidance_scale": text, "image_guidance_scale": image, **means})
    return told


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[str]]:
    return [row[name] for row in rows], [row["task_key"] for row in rows]


def _keyed(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    return {f"{row['task_key']}/{row['seed']}": row[name] for row in rows}


def _told(value: Estimate | None) -> dict[str, Any] | None:
    return value.as_dict() if value else None


def _encode_pool(pool: str, out: Path, preset: Preset) -> pa.Table:
    """The train split's candidates with their latents and similarities, sorted by key."""
    thresholds = storage.read_manifest(pool).config.get("thresholds")
    least = {"thresholds": "unknown"} if thresholds is None else thresholds
    if thresholds is None or any(value > -1 for value in thresholds.values()):
        raise ConfigError(f"{pool} was filtered: its thresholds are {dict(least)}, not all -1")
    place = out / "latents.parquet"
    if not place.exists():
        pairs = storage.read_dataset(pool, PAIRS).sort_by("pair_key")
        rows = [row for row in pairs.to_pylist() if row["split"] == "train"]
        model = StableDiffusion.load(preset.generator)
        logger.info("findings: encoding %d candidates", len(rows))
        similarities = ["index", *preset.pairs.thresholds.least()]
        for begin in range(0, len(rows), _ENCODED):
            part = rows[begin : begin + _ENCODED]
            pictures = [
                np.stack([np.asarray(decode_image(row[name]["bytes"])) for row in part])
                for name in ("source_image", "edited_image")
            ]
            for row, arrays in zip(part, encode_pairs(model, *pictures), strict=True):
                row.update(arrays)
        schema = pa.schema([*LATENTS, *(PAIRS.field(name) for name in similarities)])
        kept = [{name: row[name] for name in schema.names} for row in rows]
        with atomic_file(place) as new:
            pq.write_table(pa.Table.from_pylist(kept, schema=schema), new)
    return parquet.read_table(place)


def _chosen(pool: pa.Table, arm: Arm, seed: int, preset: Preset) -> pa.Table:
    """The pairs that an arm is trained on: rows of LATENTS."""
    names = ["pair_key", "triplet_key", "index", *preset.pairs.thresholds.least()]
    by_triplet: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for place, row in enumerate(pool.select(names).to_pylist()):
        by_triplet.setdefault(row["triplet_key"], []).append((place, row))
    triplets = sorted(by_triplet)
    random.Random(f"share/{seed}").shuffle(triplets)
    taken = triplets[: round(arm.share * len(triplets))]
    kept: list[int] = []
    for triplet in taken:
        own = by_triplet[triplet]
        reasons = select([row for _, row in own], preset.pairs.thresholds, preset.pairs.keep)
        kept += [place for (place, _), reason in zip(own, reasons, strict=True) if reason is None]
    if arm.chosen == "random":
        everything = [place for triplet in taken for place, _ in by_triplet[triplet]]
        kept = random.Random(f"random/{seed}").sample(sorted(everything), len(kept))
    return pool.take(pa.array(sorted(kept))).select(LATENTS.names)


def _counts(table: pa.Table) -> dict[str, int]:
    return {"pairs": table.num_rows, "triplets": len(set(table["triplet_key"].to_pylist()))}


def _make(
    arm: Arm, seed: int, pool: pa.Table, out: Path, config: FindingsConfig, preset: Preset
) -> None:
    """The editor of an arm and a seed, and its scores, unless they are there."""
    folder = out / f"{arm.name}-{seed}"
    editor = folder / f"editor-{config.steps}"
    if not (editor / "model_index.json").is_file():
        chosen = _chosen(pool, arm, seed, preset)
        with atomic_file(folder / "latents.parquet") as new:
            pq.write_table(chosen.cast(LATENTS), new)
        training = replace(preset.training, steps=config.steps, seed=seed, dropout=arm.dropout)
        model = StableDiffusion.load(preset.generator)
        state = start(model, training)
        for metrics in train(
            model, LatentDataset(folder / "latents.parquet"), training, state=state
        ):
            if metrics.step % 100 == 0:
                logger.info(
                    "findings: %s, seed %d, %d pairs: step %d, loss %.3f, %.2f s a step",
                    *(arm.name, seed, chosen.num_rows, metrics.step, metrics.loss, metrics.seconds),
                )
        export_editor(model, state.ema, editor, asdict(preset.editing))
    place = _scores_file(arm, seed, out, config)
    if not place.exists():
        rows = score(str(editor), config.trials(arm), config.tasks, preset)
        storage.write_bytes(place, json.dumps(rows).encode())
        right = [row["correct"] for row in rows if row["usual"]]
        logger.info("findings: %s, seed %d: %.3f right", arm.name, seed, float(np.mean(right)))


def _scores_file(arm: Arm, seed: int, out: Path, config: FindingsConfig) -> Path:
    return out / f"{arm.name}-{seed}" / f"scores-{recipe(replace(config, seeds=()))}.json"


def score(
    editor: str, trials: TrialConfig, tasks: int, preset: Preset, *, at_a_time: int = 16
) -> list[dict[str, Any]]:
    """Task, setting and measures of every answer of an editor to the miniature's tasks."""
    answering = EditorAnswerer(source=editor, trials=trials).load(batch_size=32)
    measurer = Measurer(Clip.load(preset.judge))
    drawn = scores.edit_tasks(tasks, 0)
    asked = task_rows(TaskSource(data=DRAWN, tasks=tasks))
    found = []
    for begin in range(0, tasks, at_a_time):
        part = asked[begin : begin + at_a_time]
        answers = answering.answer(part)
        shown = [
            [Shown(decode_image(answer["picture"]["bytes"])) for answer in own] for own in answers
        ]
        measured = measurer.measure(part, shown, drawn[begin : begin + at_a_time])
        for task, own, values in zip(part, answers, measured, strict=True):
            for answer, value in zip(own, values, strict=True):
                kept = {k: v for k, v in answer.items() if k not in ("picture", "own_source")}
                told = {name: value[name] for name in TOLD}
                found.append(
                    {"task_key": task["task_key"], "edit_type": task["edit_type"], **kept, **told}
                )
    return found
