"""Evaluation of editors: what is asked, and what the answers say.

A question is one picture and instruction put to one answerer at one pair of guidance scales; its
answer is a picture with its four CLIP similarities. Source: paper section 4 (the trade-off curve:
change made against picture kept, over image_guidance_scale, with equal noise at every scale).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pyarrow as pa

from ip2p_ray.editor import EditSettings
from ip2p_ray.errors import ConfigError
from ip2p_ray.schema import IMAGE, SIMILARITIES, stream_seed

START, EDITOR, SHIPPED = "start", "editor", "shipped_editor"
GENERATOR_ONLY = "generator_only"
"""Answerers: the untrained start of the editor, the trained one, one that was trained elsewhere,
and the generator, which draws the edited caption without seeing the picture."""

QUESTIONS = pa.schema(
    [
        ("question_key", pa.string()),  # question_key() of the columns that make it
        ("answerer", pa.string()),
        ("task", pa.int32()),  # number of the picture and instruction
        ("caption", pa.string()),
        ("instruction", pa.string()),
        ("edited_caption", pa.string()),
        ("source_image", IMAGE),
        ("seed", pa.int64()),  # the same for every answerer and scale of a task
        ("text_guidance_scale", pa.float64()),
        ("image_guidance_scale", pa.float64()),
    ]
)

ANSWERS = pa.schema(
    [
        *QUESTIONS,
        ("edited_image", IMAGE),
        *((name, pa.float32()) for name in SIMILARITIES),
    ]
)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much is asked."""

    tasks: int = 48
    """Pictures with an instruction that every answerer but the start is scored on."""
    shown: int = 8
    """The first of them, which the start answers too, for the report's gallery."""
    curve_tasks: int = 16
    """The first of them, asked at every scale of the curve."""
    image_guidance_scales: tuple[float, ...] = (1.0, 1.25, 1.5, 1.75, 2.0)
    """Where the guidance curve is measured (the paper: 1.0 to 2.2)."""
    seed: int = 0
    """Of the tasks and of their noise."""

    def __post_init__(self) -> None:
        for name in ("tasks", "shown", "curve_tasks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class CurvePoint:
    """One point of a guidance curve; means over `count` answers."""

    image_guidance_scale: float
    direction_similarity: float
    """How much of the asked change was made."""
    image_similarity: float
    """How much of the picture was kept."""
    count: int


def question_key(answerer: str, task: int, image_guidance_scale: float) -> str:
    """What identifies a question within one evaluation."""
    return f"{answerer}/{task:05d}/{image_guidance_scale:g}"


def questions(
    tasks: Sequence[Mapping[str, Any]],
    config: EvaluationConfig,
    settings: EditSettings,
    *,
    generator_guidance_scale: float,
) -> list[dict[str, Any]]:
    """Rows of QUESTIONS about tasks, which have caption, instruction, edited_caption, source_image.

    Every editor is asked at the settings' scales; the trained and the shipped one also at those of
    the curve. The generator has a scale of its own, and stands at the usual image_guidance_scale,
    which it does not know.
    """
    usual = settings.image_guidance_scale
    own = {GENERATOR_ONLY: generator_guidance_scale}
    asked = [(GENERATOR_ONLY, task, usual) for task in range(len(tasks))]
    asked += [(START, task, usual) for task in range(len(tasks[: config.shown]))]
    for answerer in (EDITOR, SHIPPED):
        asked += [(answerer, task, usual) for task in range(len(tasks))]
        asked += [
            (answerer, task, scale)
            for task in range(len(tasks[: config.curve_tasks]))
            for scale in config.image_guidance_scales
            if scale != usual
        ]
    return [
        {
            **tasks[task],
            "question_key": question_key(answerer, task, scale),
            "answerer": answerer,
            "task": task,
            "seed": stream_seed("evaluation", config.seed, task),
            "text_guidance_scale": own.get(answerer, settings.text_guidance_scale),
            "image_guidance_scale": scale,
        }
        for answerer, task, scale in asked
    ]


def guidance_curve(
    answers: Iterable[Mapping[str, Any]], answerer: str, config: EvaluationConfig
) -> list[CurvePoint]:
    """The points of one answerer, by rising image_guidance_scale, all over the same tasks."""
    by_scale: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
    for row in answers:
        if row["answerer"] == answerer and row["task"] < config.curve_tasks:
            by_scale[row["image_guidance_scale"]].append(row)
    return [
        CurvePoint(
            image_guidance_scale=scale,
            direction_similarity=fmean(row["direction_similarity"] for row in rows),
            image_similarity=fmean(row["image_similarity"] for row in rows),
            count=len(rows),
        )
        for scale, rows in sorted(by_scale.items())
    ]


def mean_similarities(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each of the four similarities over answers or pairs."""
    columns = list(rows)
    if not columns:
        raise ConfigError("there is no answer to take the mean of")
    return {name: fmean(row[name] for row in columns) for name in SIMILARITIES}


def funnel(manifests: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By stage: how many came in, how many were kept, and the others by reason.

    `manifests` are reports as dictionaries (`report.Report.as_dict`), in the order of the flow.
    """
    return {
        report["stage"]: {
            "in": report["rows_in"],
            "kept": report["rows_out"],
            "rejected": dict(sorted(report["rejected"].items(), key=lambda item: -item[1])),
        }
        for report in manifests
    }
