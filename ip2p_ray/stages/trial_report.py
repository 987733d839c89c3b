"""scores -> metrics.json and report.html: the tables, the curves, and the worst answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ip2p_ray import storage, trials
from ip2p_ray.intervals import BootstrapConfig
from ip2p_ray.stages.shards import PICTURE_ROWS, read_tables
from ip2p_ray.stages.trial_tasks import DRAWN, TaskSource
from ip2p_ray.stages.trials import GENERATOR, Contest, Made
from ip2p_ray.trial_page import LABELS, ShownTrial, thumbnail, trials_page
from ip2p_ray.trials import ANSWERED, PICTURE_OF, SCORED

SHOWN_BASELINES = (trials.SDEDIT, trials.PROMPT_TO_PROMPT)
"""Whose pictures stand beside the editors' in the gallery."""

_OF_A_TASK = ("direction_similarity", "image_similarity", "truth_l1", "truth_clip", "correct")


def write_report(
    folder: str,
    source: TaskSource,
    contest: Contest,
    made: Made,
    config: BootstrapConfig,
    *,
    shown: int,
) -> dict[str, Any]:
    """What `<folder>/metrics.json` holds; writes it and `<folder>/report.html`, each whole."""
    first = next(iter(contest.editors))
    table = trials.table(made.rows, config)
    types = trials.by_type(made.rows, config)
    curves = trials.curves(made.rows, made.trials, config)
    compared = [row for row in made.rows if row["answerer"] in contest.editors]
    differences = trials.differences(compared, first, config)
    skipped = _skipped(made, contest)
    worst, order = _worst(made.rows, first, shown)
    metrics = trials.as_json(
        {
            "table": table,
            "by_type": types,
            "curves": curves,
            "differences_to_first": differences,
            "first": first,
            "tasks": {**asdict(source), "data": source.data, "used": made.tasks.rows},
            "trials": asdict(made.trials),
            "pairs": asdict(contest.pairs),
            "generator_guidance_scale": _edit_scale(contest),
            "bootstrap": asdict(config),
            "models": dict(made.models),
            "judge": contest.judges.clip,
            "skipped": skipped,
        }
    )
    text = trials_page(
        title=f"Evaluation of {', '.join(contest.editors)}",
        facts=_facts(source, contest, made, config),
        table=table,
        settings=_settings(made.rows),
        curves=curves,
        types=types,
        differences=differences,
        first=first,
        shown=_gallery(worst, contest, made),
        order=order,
        skipped=skipped,
    )
    storage.write_bytes(storage.join(folder, "report.html"), text.encode())
    told = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    storage.write_bytes(storage.join(folder, "metrics.json"), told.encode())
    return metrics


def _facts(
    source: TaskSource, contest: Contest, made: Made, config: BootstrapConfig
) -> dict[str, str]:
    groups = len({row["group"] for row in made.rows})
    what = "scenes of the drawn world that no training picture shows"
    if source.is_pairs:
        what = f"held-out pairs of {source.data}, whose true pictures the generator made"
    elif source.data != DRAWN:
        what = f"{source.data}, {source.turns} turns"
    points = made.trials.curve_tasks
    few = "all" if points is None or points >= made.tasks.rows else f"{points}"
    scales = " and ".join(f"{scale:g}" for scale in made.trials.text_guidance_scales)
    return {
        "tasks": f"{made.tasks.rows:,} in {groups:,} groups: {what}",
        "judge": f"{contest.judges.clip} (weights {made.models['judge'][:12]})",
        "intervals": (
            f"{config.level:.0%}, bootstrap over groups, {config.resamples:,} resamples, "
            f"seed {config.seed}"
        ),
        "curves": (
            f"of every editor at text_guidance_scale {scales}, over {few} tasks, equal noise at "
            f"every point, seed {made.trials.seed}"
        ),
        **{
            name: f"{place} (content {made.models[name][:12]})"
            for name, place in contest.editors.items()
        },
        "generator of the baselines": (
            f"{contest.generator.source}, {contest.pairs.steps} steps of {contest.pairs.sampler}, "
            f"guidance {_edit_scale(contest):g} for SDEdit and Prompt-to-Prompt, "
            f"{sum(contest.pairs.guidance_scale) / 2:g} for its own pairs"
        ),
        "compared": (
            "each answer with the input and the true picture, which are cut to its aspect as an "
            "editor cuts its input"
        ),
        "comparable": "only with numbers of this harness: CLIP, preprocessing and sizes differ",
    }


def _edit_scale(contest: Contest) -> float:
    if contest.guidance_scale is not None:
        return contest.guidance_scale
    return sum(contest.pairs.guidance_scale) / 2


def _skipped(made: Made, contest: Contest) -> list[str]:
    there = {name for row in made.rows for name, value in row.items() if value is not None}
    found = []
    if contest.judges.dino is None:
        found.append("DINO: no --dino was given (a transformers folder of a ViT or DINOv2).")
    if "truth_l1" not in there:
        found.append("L1, L2, CLIP-I and DINO against a true picture: these tasks have none.")
    if "direction_similarity" not in there:
        found.append("Direction similarity and the curves: these tasks lack captions.")
    if "edited_caption_similarity" not in there:
        found.append("CLIP-T: these tasks have no caption of the edited picture.")
    answered = {row["answerer"] for row in made.rows}
    for name in trials.BASELINES:
        if name not in answered and name != trials.TRUTH:
            why = "these tasks are all about one picture"
            if name != trials.ANOTHER:
                why = "it draws captions, which these tasks lack"
            found.append(f"{LABELS[name]}: {why}.")
    return found


def _settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each answerer's usual setting, in words."""
    found = {}
    for row in rows:
        if row["usual"] and row["answerer"] not in found:
            numbers = {
                name: row[name]
                for name in vars(trials.Setting())
                if name != "usual" and row[name] is not None
            }
            found[row["answerer"]] = ", ".join(f"{k} {v:g}" for k, v in numbers.items())
    return found


def _worst(
    rows: Sequence[Mapping[str, Any]], first: str, most: int
) -> tuple[list[Mapping[str, Any]], str]:
    """The first editor's worst answers at its usual setting, and what that means."""
    own = [row for row in rows if row["answerer"] == first and row["usual"]]
    own.sort(key=lambda row: (trials.badness(row), row["task_key"]), reverse=True)
    told = "by image similarity"
    if own and own[0]["correct"] is not None:
        told = "those that are wrong by the oracle first, then by their difference to the truth"
    elif own and own[0]["truth_clip"] is not None:
        told = "by their similarity with the true picture"
    elif own and own[0]["direction_similarity"] is not None:
        told = "by direction similarity"
    elif own and own[0]["edited_caption_similarity"] is not None:
        told = "by their similarity with the edited caption"
    return own[:most], told


def _gallery(worst: Sequence[Mapping[str, Any]], contest: Contest, made: Made) -> list[ShownTrial]:
    keys = [row["task_key"] for row in worst]
    tasks = _rows(made.answers[GENERATOR], keys)
    editors = {name: _rows(made.answers[name], keys) for name in contest.editors}
    found = []
    for row in worst:
        task = tasks[row["task_key"]]
        pictures = {"the input": _shown(task[PICTURE_OF[trials.COPY]])}
        for name, answers in editors.items():
            pictures[name] = _shown(_usual(answers[row["task_key"]], trials.EDITOR))
        for name in SHOWN_BASELINES:
            pictures[LABELS[name]] = _shown(_usual(task, name))
        if task[PICTURE_OF[trials.TRUTH]] is not None:
            pictures[LABELS[trials.TRUTH]] = _shown(task[PICTURE_OF[trials.TRUTH]])
        found.append(
            ShownTrial(
                instructions=task["instructions"],
                caption=task["caption"],
                edited_caption=task["edited_caption"],
                edit_type=task["edit_type"],
                pictures=pictures,
                values={name: row[name] for name in _OF_A_TASK},
            )
        )
    return found


def _rows(uri: str, keys: Sequence[str]) -> dict[str, Any]:
    """The rows of ANSWERED of these tasks, by their keys."""
    wanted, found = set(keys), {}
    for part in read_tables(uri, ANSWERED, rows=PICTURE_ROWS):
        for row in part.to_pylist():
            if row["task_key"] in wanted:
                found[row["task_key"]] = row
    return found


def _usual(row: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    there = (a["picture"] for a in row["answers"] if a["usual"] and a["kind"] == kind)
    picture: Mapping[str, Any] | None = next(there, None)
    return picture


def _shown(picture: Mapping[str, Any] | None) -> bytes | None:
    return None if picture is None else thumbnail(picture["bytes"])


assert set(_OF_A_TASK) <= set(SCORED.names)
