"""Reports as HTML pages of one file each: no script, nothing loaded from outside."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from ip2p_ray.report import Report, duration
from ip2p_ray.triplets.quality import Quality

if TYPE_CHECKING:  # these load torch and diffusers, which a page does without
    from ip2p_ray.evaluation import CurvePoint
    from ip2p_ray.pairs import PairConfig

TEMPLATE = "report.html.jinja"
TRIPLETS_TEMPLATE = "triplets.html.jinja"
PAIRS_TEMPLATE = "pairs.html.jinja"
COLOURS = (
    *("#2f6fde", "#c8553d", "#3a8f5c", "#8a5cc2"),
    *("#b0812a", "#2a93a3", "#c24f8d", "#7a8494"),
)
"""Of the series of a plot; legible on white and on black."""

ANSWERERS = {
    "editor": "the editor trained here",
    "shipped_editor": "the shipped editor",
    "copy_input": "the input, left as it was",
    "generator_only": "the generator, from the edited caption alone",
    "chance": "chance",
}
"""How the table of scores names the keys of metrics.json."""


@dataclass(frozen=True, kw_only=True)
class ShownPair:
    """One accepted pair; the images are PNG bytes."""

    caption: str
    instruction: str
    edited_caption: str
    source_image: bytes
    edited_image: bytes
    similarities: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ShownCandidate:
    """One candidate; the images are PNG or JPEG bytes."""

    caption: str
    instruction: str
    edited_caption: str
    source_image: bytes
    edited_image: bytes
    reason: str | None
    """Why it was rejected; None where it was kept."""
    values: Mapping[str, float | None]
    """Similarities and draws, by name."""


@dataclass(frozen=True, kw_only=True)
class Bins:
    """A histogram of two kinds of rows, one on top of the other."""

    start: float
    """Where the first bin begins."""
    width: float
    """Of each bin."""
    rejected: Sequence[int]
    kept: Sequence[int]
    threshold: float
    """Marked with a line."""


@dataclass(frozen=True, kw_only=True)
class ShownEdit:
    """One question with what each answerer made of it."""

    caption: str
    instruction: str
    pictures: Mapping[str, bytes]
    """PNG bytes by what the column is headed with, the same keys in every edit."""


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    """Written at the points, where given."""
    spans: Sequence[tuple[tuple[float, float], tuple[float, float]]] = ()
    """Intervals of x and of y at the points, where given."""


def page(
    *,
    title: str,
    metrics: Mapping[str, Any],
    pairs: Sequence[ShownPair],
    edits: Sequence[ShownEdit],
    curves: Mapping[str, Sequence[CurvePoint]],
    losses: Sequence[tuple[float, float]],
    command: str,
) -> str:
    """The page's text. `metrics` is what metrics.json holds; `command` is what to type next."""
    return template(TEMPLATE).render(
        title=title,
        metrics=metrics,
        scored={label: metrics[name] for name, label in ANSWERERS.items() if name in metrics},
        pairs=pairs,
        edits=edits,
        curve=plot(
            [
                Series(
                    name,
                    [(point.image_similarity, point.direction_similarity) for point in points],
                    [f"{point.image_guidance_scale:g}" for point in points],
                )
                for name, points in curves.items()
            ],
            x_label="image similarity: the picture is kept",
            y_label="direction similarity: the edit is made",
        ),
        loss=plot([Series("loss", losses)], x_label="optimizer step", y_label="loss"),
        command=command,
    )


def triplets_page(report: Report, quality: Quality, *, writer: str) -> str:
    """What became of a writer's replies, and what its triplets are like."""
    names = {"caption": "the caption", "instruction": "the instruction"}
    names["edited_caption"] = "the edited caption"
    return template(TRIPLETS_TEMPLATE).render(
        report=report.as_dict(),
        quality=quality,
        writer=writer,
        verbs=_most(quality.verbs, 24),
        kinds=dict(quality.kinds),
        lengths={title: _binned(quality.lengths[name]) for name, title in names.items()},
    )


def pairs_page(
    *,
    report: Mapping[str, Any],
    device_seconds: float,
    histograms: Mapping[str, Bins],
    shares: Sequence[tuple[float, float]],
    galleries: Mapping[tuple[str, str], Sequence[ShownCandidate]],
    config: PairConfig,
) -> str:
    """What became of all candidates, and pictures of some.

    `report` is `Report.as_dict`, `shares` the share that passes all thresholds by self_replace,
    and `galleries` are by title and note.
    """
    least = config.thresholds.least()
    return template(PAIRS_TEMPLATE).render(
        report=report,
        device_seconds=device_seconds,
        config=config,
        least=least,
        histograms={name: histogram(bins, x_label=name) for name, bins in histograms.items()},
        shares=plot(
            [Series("accepted", shares)],
            x_label="self_replace: the fraction of steps that take the source's attention",
            y_label="share of candidates that pass",
            from_zero=True,
        ),
        galleries=galleries,
    )


def histogram(bins: Bins, *, x_label: str, width: int = 420, height: int = 220) -> Markup:
    """Bars of the rejected below the kept and a line at the threshold, as an inline SVG."""
    left, right, top, bottom = 16, 16, 26, 46
    total = [lost + kept for lost, kept in zip(bins.rejected, bins.kept, strict=True)]
    most = max(*total, 1)
    end = bins.start + bins.width * len(total)
    ticks = _ticks([bins.start, end])
    across = (width - left - right) / (ticks[-1] - ticks[0])
    up = (height - top - bottom) / most
    name = x_label.replace("_", " ")

    def place(value: float) -> float:
        return round(left + (value - ticks[0]) * across, 1)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="histogram of {name}">']
    for number, (lost, kept) in enumerate(zip(bins.rejected, bins.kept, strict=True)):
        x = place(bins.start + number * bins.width)
        wide = max(bins.width * across - 0.5, 0.5)
        floor = height - bottom
        for colour, low, count in (("var(--lost)", 0, lost), ("var(--bar)", lost, kept)):
            if count:
                parts.append(
                    f'<rect x="{x}" y="{floor - (low + count) * up:.1f}" width="{wide:.1f}" '
                    f'height="{count * up:.1f}" style="fill:{colour}"/>'
                )
    below = height - bottom + 16
    parts += [_text(place(tick), below, f"{tick:g}", "middle") for tick in ticks]
    if ticks[0] <= bins.threshold <= ticks[-1]:
        x = place(bins.threshold)
        parts.append(
            f'<line x1="{x}" y1="{top - 20}" x2="{x}" y2="{height - bottom}" '
            f'style="stroke:{COLOURS[1]};stroke-width:2"/>'
        )
        side = "end" if x > width / 2 else "start"
        gap = -6 if side == "end" else 6
        parts.append(_text(x + gap, top - 10, f"at least {bins.threshold:.3g}", side))
    parts.append(_text(width / 2, height - 8, name, "middle"))
    return Markup("".join([*parts, "</svg>"]))


def _most(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """The first so many, and all others together."""
    first = dict(list(counts.items())[:most])
    rest = sum(counts.values()) - sum(first.values())
    return {**first, f"{len(counts) - most} others": rest} if rest else first


def _binned(counts: Mapping[int, int], most: int = 16) -> dict[str, int]:
    """Counts by number of words, neighbours taken together until there are no more than `most`."""
    if not counts:
        return {}
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // most)
    bins: dict[str, int] = {}
    for start in range(low, high + 1, width):
        last = start + width - 1
        name = f"{start}" if width == 1 else f"{start} to {last}"
        bins[name] = sum(counts.get(length, 0) for length in range(start, last + 1))
    return bins


def template(name: str) -> jinja2.Template:
    """A page's template; `picture` makes image bytes a data URI, `duration` seconds a text."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: resources.files("ip2p_ray").joinpath("templates", name).read_text("utf-8")
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(picture=_data_uri, duration=duration)
    return environment.get_template(name)


def plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    width: int = 560,
    height: int = 320,
    legend: bool = True,
    ticks: int = 4,
    from_zero: bool = False,
    logarithmic: bool = False,
) -> Markup:
    """Lines through the points of each series as an inline SVG; empty where there is no point.

    Without `legend` the names are told elsewhere, in the order of COLOURS. Each axis has at least
    so many `ticks`. With `from_zero` y begins at 0, for what is never below; with `logarithmic`
    equal ways up are equal factors, for values above 0 alone.
    """
    points = [point for line in series for point in line.points]
    if not points:
        return Markup("")
    spans = [span for line in series for span in line.spans]
    points += [(x, y) for across, up in spans for x, y in zip(across, up, strict=True)]
    if from_zero:
        points += [(points[0][0], 0.0), (points[0][0], max(y for _, y in points) or 1.0)]
    left, right, top, bottom = 62, 16, 28 if legend else 16, 46
    x_ticks, y_ticks = (_ticks(values, ticks) for values in zip(*points, strict=True))
    if logarithmic:
        y_ticks = _factors([y for _, y in points])
    scale: Callable[[float], float] = math.log if logarithmic else float

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (scale(y) - scale(y_ticks[0])) / (scale(y_ticks[-1]) - scale(y_ticks[0]))
        return (
            round(left + across * (width - left - right), 1),
            round(height - bottom - up * (height - top - bottom), 1),
        )

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{y_label}; {x_label}">']
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(_line((x, top), (x, height - bottom)))
        parts.append(_text(x, height - bottom + 16, f"{tick:g}", "middle"))
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(_line((left, y), (width - right, y)))
        parts.append(_text(left - 6, y + 4, f"{tick:g}", "end"))
    parts.append(_text((left + width - right) / 2, height - 8, x_label, "middle"))
    middle = (top + height - bottom) / 2
    turned = f'transform="translate(14 {middle}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {turned}>{y_label}</text>")
    for number, line in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        for (x, y), (across, up) in zip(line.points, line.spans, strict=False):
            for start, end in (((across[0], y), (across[1], y)), ((x, up[0]), (x, up[1]))):
                parts.append(_line(place(*start), place(*end), colour))
        parts += _drawn(line, [place(*point) for point in line.points], colour)
        if legend:
            parts.append(
                f'<text x="{left + 130 * number}" y="16" style="fill:{colour}">{line.name}</text>'
            )
    return Markup("".join([*parts, "</svg>"]))


def _drawn(line: Series, places: Sequence[tuple[float, float]], colour: str) -> list[str]:
    path = " ".join(f"{x},{y}" for x, y in places)
    parts = [f'<polyline points="{path}" style="fill:none;stroke:{colour};stroke-width:2"/>']
    for index, label in enumerate(line.labels):
        x, y = places[index]
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" style="fill:{colour}"/>')
        parts.append(_text(x + 6, y - 6, label, "start"))
    return parts


def _line(start: tuple[float, float], end: tuple[float, float], colour: str = "") -> str:
    style = f' style="stroke:{colour};stroke-opacity:0.35"' if colour else ""
    return f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}"{style}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _ticks(values: Sequence[float], least: int = 4) -> list[float]:
    """Some more than `least` round numbers whose range holds all values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / least
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _factors(values: Sequence[float]) -> list[float]:
    """Numbers 1, 2, 5, 10, ... whose range holds all values; at least two."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    first = max(index for index, step in enumerate(steps) if step <= low)
    last = min(index for index, step in enumerate(steps) if step >= high and index > first)
    return steps[first : last + 1]


def _data_uri(data: bytes) -> str:
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
