"""The report of an evaluation: one HTML file with its plots, tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ip2p_ray.gallery import COLOURS, Series, plot, template
from ip2p_ray.images import decode_image, encode_image
from ip2p_ray.intervals import Estimate
from ip2p_ray.trials import (
    ANOTHER,
    COPY,
    GENERATED_PAIR,
    LESS_IS_BETTER,
    MEASURES,
    PROMPT_TO_PROMPT,
    SDEDIT,
    TRUTH,
    Point,
)

TEMPLATE = "trials.html.jinja"

LABELS = {
    COPY: "the input, left as it was",
    ANOTHER: "another picture",
    SDEDIT: "SDEdit",
    PROMPT_TO_PROMPT: "Prompt-to-Prompt on the inverted input",
    GENERATED_PAIR: "the generator's own pair, nothing chosen",
    TRUTH: "the true picture",
}
"""What a baseline is called; an editor has a name."""

HEADINGS = {
    "direction_similarity": "direction",
    "image_similarity": "image",
    "edited_caption_similarity": "CLIP-T",
    "caption_similarity": "input with caption",
    "truth_l1": "L1",
    "truth_l2": "L2",
    "truth_clip": "CLIP-I",
    "truth_dino": "DINO",
    "source_l1": "L1 to input",
    "source_dino": "DINO to input",
    "correct": "forced choice",
    "preservation_error": "preservation error",
}

GROUPS = {
    "Right by the oracle": ("correct", "preservation_error"),
    "Change made, picture kept": (
        *("direction_similarity", "image_similarity", "edited_caption_similarity"),
        *("source_l1", "source_dino"),
    ),
    "Against the true picture": ("truth_l1", "truth_l2", "truth_clip", "truth_dino"),
}
"""The tables of the page, with their columns."""

APART = (COPY, ANOTHER)
"""Told beside the plot, for they lie far from all others."""

APART_AT_LEAST = 0.04
"""Similarity between the ends of a curve without which no numbers are written there."""

THUMBNAIL = 256
"""Pixels of the longer side of a shown picture, at most."""


@dataclass(frozen=True, kw_only=True)
class ShownTrial:
    """One task with what each answerer made of it."""

    instructions: Sequence[str]
    caption: str | None
    edited_caption: str | None
    edit_type: str | None
    pictures: Mapping[str, bytes | None]
    """Encoded pictures by what the column is headed with; None where there is no answer."""
    values: Mapping[str, float | None]
    """The first editor's measures."""


def trials_page(
    *,
    title: str,
    facts: Mapping[str, str],
    table: Mapping[str, Mapping[str, Estimate]],
    settings: Mapping[str, str],
    curves: Mapping[str, Sequence[Sequence[Point]]],
    types: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    differences: Mapping[str, Mapping[str, Estimate]],
    first: str,
    shown: Sequence[ShownTrial],
    order: str,
    skipped: Sequence[str],
) -> str:
    """The page's text.

    `facts` are the conditions by name, `settings` what each answerer's table row was made with,
    `order` says what "worst" means, and `skipped` are sentences about what was not measured.
    """
    lines = _lines({name: points for name, points in curves.items() if name not in APART})
    return template(TEMPLATE).render(
        title=title,
        facts=facts,
        tables={
            name: [measure for measure in columns if any(measure in row for row in table.values())]
            for name, columns in GROUPS.items()
        },
        table=table,
        settings=settings,
        labels=LABELS,
        headings=HEADINGS,
        meanings=MEASURES,
        less=LESS_IS_BETTER,
        curve=plot(
            [line for line, _ in lines],
            x_label="image similarity: the picture is kept",
            y_label="direction similarity: the edit is made",
            width=760,
            height=480,
            legend=False,
            ticks=6,
        ),
        apart={LABELS[name]: points[0][0] for name, points in curves.items() if name in APART},
        legend=[
            (line.name, told, COLOURS[number % len(COLOURS)])
            for number, (line, told) in enumerate(lines)
        ],
        compared=[
            name
            for columns in GROUPS.values()
            for name in columns
            if any(name in row for row in differences.values())
        ],
        types=types,
        typed=_typed(types),
        differences=differences,
        first=first,
        shown=shown,
        order=order,
        skipped=skipped,
    )


def thumbnail(data: bytes) -> bytes:
    """The picture as it is shown: small ones as they are, others shrunk and as JPEG."""
    picture = decode_image(data)
    if max(picture.size) <= THUMBNAIL:
        return data
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return encode_image(picture, "jpeg")


def _typed(types: Mapping[str, Mapping[str, Mapping[str, Estimate]]]) -> list[str]:
    """What is told by edit type: the oracle's choice, or else what CLIP says."""
    there = {name for own in types.values() for means in own.values() for name in means}
    wanted = ("correct",) if "correct" in there else ("direction_similarity", "truth_clip")
    return [name for name in wanted if name in there]


def _lines(curves: Mapping[str, Sequence[Sequence[Point]]]) -> list[tuple[Series, str]]:
    """Each curve with what its labels are."""
    found = []
    for name, lines in curves.items():
        for points in lines:
            varied, told = _varied(points)
            called, scale = LABELS.get(name, name), points[0].setting.text_guidance_scale
            if len(lines) > 1:
                called += f", text_guidance_scale {scale:g}"
            elif scale is not None:
                told += f"{' at ' if told else ''}text_guidance_scale {scale:g}"
            found.append(
                (
                    Series(
                        called,
                        [
                            (point.image_similarity.mean, point.direction_similarity.mean)
                            for point in points
                        ],
                        _at_the_ends(points, varied),
                        [
                            (_span(p.image_similarity), _span(p.direction_similarity))
                            for p in points
                        ],
                    ),
                    told,
                )
            )
    return found


def _varied(points: Sequence[Point]) -> tuple[str | None, str]:
    """The setting that the points differ in, and what is said of it."""
    for name in ("image_guidance_scale", "strength", "self_replace"):
        values = [getattr(point.setting, name) for point in points]
        if values[0] is not None and len(points) > 1:
            return name, f"{name} {_number(min(values))} to {_number(max(values))}"
    return None, ""


def _at_the_ends(points: Sequence[Point], varied: str | None) -> list[str]:
    """What is written at each point; nothing where the ends, or all points, lie on one another."""
    labels = [""] * len(points)
    ends = (points[0], points[-1])
    wide, high = (
        abs(ends[1].image_similarity.mean - ends[0].image_similarity.mean),
        abs(ends[1].direction_similarity.mean - ends[0].direction_similarity.mean),
    )
    if varied is not None and max(wide, high) >= APART_AT_LEAST:
        labels[0], labels[-1] = (_number(getattr(end.setting, varied)) for end in ends)
    return labels


def _span(value: Estimate) -> tuple[float, float]:
    if value.low is None or value.high is None:
        return value.mean, value.mean
    return value.low, value.high


def _number(value: Any) -> str:
    return f"{value:g}"


assert set(HEADINGS) == set(MEASURES)
