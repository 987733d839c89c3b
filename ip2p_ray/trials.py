"""Trials: tasks put to answerers at settings, and what the answers' measures say together.

A task is a picture with what is to be done to it; an answerer makes pictures of it, one at each
setting; a measure is a number about one answer. Source: paper section 4 (the trade-off curve over
image_guidance_scale, with the same tasks and noise at every point, and its baselines).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa

from ip2p_ray.errors import ConfigError
from ip2p_ray.intervals import BootstrapConfig, Estimate, difference, estimate
from ip2p_ray.schema import IMAGE, SIMILARITIES, stream_seed

COPY, ANOTHER, TRUTH = "copy_input", "another_picture", "truth"
SDEDIT, PROMPT_TO_PROMPT = "sdedit", "prompt_to_prompt"
GENERATED_PAIR = "generated_pair"
EDITOR = "editor"
BASELINES = (COPY, ANOTHER, SDEDIT, PROMPT_TO_PROMPT, GENERATED_PAIR, TRUTH)
"""Every answerer that is no editor, in the order in which they are told."""

PICTURE_OF = {COPY: "source_image", ANOTHER: "another_image", TRUTH: "edited_image"}
"""Answerers that a column of TASKS answers for."""

MEASURES: dict[str, str] = {
    "direction_similarity": "similarity of the change made with the change of captions (CLIP)",
    "image_similarity": "similarity with the input (CLIP)",
    "edited_caption_similarity": "similarity with the edited caption (CLIP)",
    "caption_similarity": "similarity of the input with its caption (CLIP)",
    "truth_l1": "mean absolute difference to the true picture, on [0, 1]",
    "truth_l2": "mean squared difference to the true picture, on [0, 1]",
    "truth_clip": "similarity with the true picture (CLIP)",
    "truth_dino": "similarity with the true picture (DINO)",
    "source_l1": "mean absolute difference to the input, on [0, 1]",
    "source_dino": "similarity with the input (DINO)",
    "correct": "share of answers to which, of the scene and all edits of it, the true picture is "
    "the nearest",
    "preservation_error": "mean absolute error where nothing had to change, on [0, 1]",
}
"""What is measured of an answer; null where the task lacks what it takes."""

LESS_IS_BETTER = ("truth_l1", "truth_l2", "preservation_error")

TASKS = pa.schema(
    [
        ("task_key", pa.string()),  # task_key() of all that makes the task
        ("number", pa.int32()),  # from 0, in the order of the set
        ("place", pa.string()),  # what the set calls it
        ("group", pa.string()),  # tasks about one picture, resampled together
        ("edit_type", pa.string()),  # null where the set has no types
        ("caption", pa.string()),  # null where the set has none
        ("instructions", pa.list_(pa.string())),  # done one after the other, mostly one
        ("edited_caption", pa.string()),  # null where the set has none
        ("source_image", IMAGE),
        ("edited_image", IMAGE),  # the true one; null where there is none
        ("another_image", IMAGE),  # the source of a task of another group
    ]
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """At what an answerer answered; None is what it does not have."""

    usual: bool = True
    """Whether it is the one that the table tells, at which every task is answered."""
    text_guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    strength: float | None = None
    """SDEdit's: the share of steps that are taken."""
    self_replace: float | None = None
    """Prompt-to-Prompt's: the fraction of steps that take the source's self-attention."""


_SETTING: list[tuple[str, pa.DataType]] = [
    ("kind", pa.string()),  # EDITOR or one of BASELINES
    ("usual", pa.bool_()),
    *((field.name, pa.float64()) for field in fields(Setting) if field.name != "usual"),
]

_WHO: list[tuple[str, pa.DataType]] = [
    ("answer_key", pa.string()),  # answer_key() of the two below
    ("answerer", pa.string()),  # digest of all that makes it answer as it does
]

ANSWERED = pa.schema(
    [
        *_WHO,
        *TASKS,
        (
            "answers",
            pa.list_(
                pa.struct(
                    [
                        *_SETTING,
                        ("picture", IMAGE),
                        ("own_source", IMAGE),  # of GENERATED_PAIR, which drew both; else null
                    ]
                )
            ),
        ),
    ]
)

MEASURED = pa.schema(
    [
        *_WHO,
        *(TASKS.field(name) for name in ("task_key", "number", "place", "group", "edit_type")),
        (
            "answers",
            pa.list_(pa.struct([*_SETTING, *((name, pa.float32()) for name in MEASURES)])),
        ),
    ]
)

SCORED = pa.schema(
    [
        ("answerer", pa.string()),  # what an editor is called, or the name of a baseline
        *(TASKS.field(name) for name in ("task_key", "number", "place", "group", "edit_type")),
        *_SETTING,
        *((name, pa.float32()) for name in MEASURES),
    ]
)
"""A row an answer: what `scores.parquet` holds."""


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """What is asked of every answerer; scales that are None are an editor's own."""

    curve_tasks: int | None = None
    """The first of all tasks, asked at every point of the curves; None is all."""
    text_guidance_scale: float | None = None
    """Of the table."""
    image_guidance_scale: float | None = None
    """Of the table."""
    text_guidance_scales: tuple[float, ...] = ()
    """Of the curves, a curve each (7.5 in the paper); none is the table's. Curves of editors whose
    own scales differ are comparable only where it is stated."""
    image_guidance_scales: tuple[float, ...] = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
    """The points of an editor's curve (the paper's)."""
    strengths: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """The points of SDEdit's curve (the paper's range); the middle one is the table's."""
    self_replaces: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """The points of Prompt-to-Prompt's curve; the middle one is the table's."""
    seed: int = 0
    """Of the noise: a task's is the same for every answerer and setting."""

    def __post_init__(self) -> None:
        if self.curve_tasks is not None and self.curve_tasks < 0:
            raise ConfigError(f"curve_tasks is not negative, got {self.curve_tasks}")
        for name in ("strengths", "self_replaces"):
            values = getattr(self, name)
            low = 0 if name == "self_replaces" else 1e-9
            if not values or not all(low <= value <= 1 for value in values):
                raise ConfigError(f"{name} are one or more numbers in [0, 1], got {values}")

    def on_curve(self, number: int) -> bool:
        """Whether the task is asked at every point."""
        return self.curve_tasks is None or number < self.curve_tasks

    def editor_settings(self, text: float, image: float) -> tuple[list[Setting], list[Setting]]:
        """The one of the table, and those of the curves only; an editor's own scales are given."""
        text = text if self.text_guidance_scale is None else self.text_guidance_scale
        image = image if self.image_guidance_scale is None else self.image_guidance_scale
        points = [
            (each, scale)
            for each in self.text_guidance_scales or (text,)
            for scale in self.image_guidance_scales
        ]
        usual = Setting(text_guidance_scale=text, image_guidance_scale=image)
        return [usual], [
            Setting(usual=False, text_guidance_scale=each, image_guidance_scale=scale)
            for each, scale in dict.fromkeys(points)
            if (each, scale) != (text, image)
        ]

    def of_one_number(self, name: str) -> tuple[list[Setting], list[Setting]]:
        """The same of a baseline with one number, "strength" or "self_replace"."""
        values = sorted(set(getattr(self, f"{name}s")))
        usual = values[len(values) // 2]
        made = {value: Setting(usual=value == usual, **{name: value}) for value in values}
        return [made[usual]], [made[value] for value in values if value != usual]


def task_key(place: str, group: str, instructions: Sequence[str], *digests: str) -> str:
    """32 hex digits that identify a task; `digests` are those of its pictures."""
    parts = (place, group, *instructions, *digests)
    return "".join(f"{stream_seed('task', side, *parts):016x}" for side in (0, 1))


def noise_seed(config: TrialConfig, key: str, turn: int = 0) -> int:
    """The seed of a task's noise; each instruction of a task has noise of its own."""
    return stream_seed("trial", config.seed, key, turn)


def answer_key(task_key: str, answerer: str) -> str:
    """What identifies the answers of an answerer to a task."""
    return f"{task_key}/{answerer}"


def flat(rows: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of SCORED of rows of MEASURED, sorted; `names` are those of editors by their digests."""
    found = [
        {
            **{name: value for name, value in row.items() if name != "answers"},
            **answer,
            "answerer": names.get(row["answerer"]) or answer["kind"],
        }
        for row in rows
        for answer in row["answers"]
    ]
    order = {name: place for place, name in enumerate((*names.values(), *BASELINES))}
    return sorted(found, key=lambda row: (order[row["answerer"]], row["number"]))


def table(
    rows: Sequence[Mapping[str, Any]], config: BootstrapConfig
) -> dict[str, dict[str, Estimate]]:
    """Of rows of SCORED, by answerer, the mean of every measure at its usual setting."""
    usual = [row for row in rows if row["usual"]]
    return {answerer: means(own, config) for answerer, own in _by(usual, "answerer").items()}


def by_type(
    rows: Sequence[Mapping[str, Any]], config: BootstrapConfig
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """The same by answerer and edit type; empty where the tasks have no types."""
    return {
        answerer: {
            kind: means(some, config) for kind, some in sorted(_by(own, "edit_type").items())
        }
        for answerer, own in _by(
            [row for row in rows if row["usual"] and row["edit_type"]], "answerer"
        ).items()
    }


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a curve."""

    setting: Setting
    direction_similarity: Estimate
    """How much of the asked change was made."""
    image_similarity: Estimate
    """How much of the picture was kept."""


def curves(
    rows: Sequence[Mapping[str, Any]], trials: TrialConfig, config: BootstrapConfig
) -> dict[str, list[list[Point]]]:
    """Of rows of SCORED, by answerer, its curves over the same tasks; one number varies in each.

    An answerer with one setting has one point. Who has no direction similarity, for want of
    captions, has no curve.
    """
    found: dict[str, list[list[Point]]] = {}
    asked = [
        row
        for row in rows
        if trials.on_curve(row["number"]) and row["direction_similarity"] is not None
    ]
    for answerer, own in _by(asked, "answerer").items():
        lines: dict[float | None, list[Point]] = defaultdict(list)
        for setting, some in sorted(_by_setting(own).items(), key=lambda item: _order(item[0])):
            # the table's setting need not lie on the curve
            if _is_point(setting, own, trials):
                values = means(some, config)
                point = Point(
                    setting=setting,
                    direction_similarity=values["direction_similarity"],
                    image_similarity=values["image_similarity"],
                )
                lines[setting.text_guidance_scale].append(point)
        found[answerer] = [line for line in lines.values() if line]
    return {answerer: lines for answerer, lines in found.items() if lines}


def differences(
    rows: Sequence[Mapping[str, Any]], first: str, config: BootstrapConfig
) -> dict[str, dict[str, Estimate]]:
    """Of each other answerer, its measures minus the first one's, task by task."""
    usual = [row for row in rows if row["usual"]]
    groups = {row["task_key"]: row["group"] for row in usual}
    by_answerer = _by(usual, "answerer")
    found: dict[str, dict[str, Estimate]] = {}
    for answerer, own in by_answerer.items():
        if answerer == first:
            continue
        found[answerer] = {}
        for name in MEASURES:
            mine, theirs = (_values(some, name) for some in (own, by_answerer.get(first, [])))
            told = difference(mine, theirs, groups, config)
            if told is not None:
                found[answerer][name] = told
    return found


def means(rows: Sequence[Mapping[str, Any]], config: BootstrapConfig) -> dict[str, Estimate]:
    """The mean of every measure that some of the rows have."""
    found = {}
    for name in MEASURES:
        some = [row for row in rows if row[name] is not None]
        told = estimate([row[name] for row in some], [row["group"] for row in some], config)
        if told is not None:
            found[name] = told
    return found


def badness(row: Mapping[str, Any]) -> tuple[float, ...]:
    """Orders answers of one answerer from the best to the worst, by the surest that is known.

    The oracle's choice and then the difference to the true picture, where the world is drawn; the
    similarity with the true picture, where there is one; else the direction similarity.
    """
    if row["correct"] is not None:
        return (-row["correct"], row["truth_l1"])
    if row["truth_clip"] is not None:
        return (-row["truth_clip"],)
    for name in ("direction_similarity", "edited_caption_similarity"):
        if row[name] is not None:
            return (-row[name],)
    return (-row["image_similarity"],)


def told_apart(sources: Sequence[str]) -> list[str]:
    """A short name of each folder or hub id: as many of its last parts as tell it from the others.

    Raises:
        ConfigError: two are the same, or one has the name of a baseline.
    """
    if len(set(sources)) != len(sources):
        raise ConfigError(f"an editor is named twice: {', '.join(sources)}")
    parts = [source.rstrip("/").split("/") for source in sources]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names) and not set(names) & set(BASELINES):
            return names
    raise ConfigError(f"no names tell these editors apart: {', '.join(sources)}")


def as_json(value: Any) -> Any:
    """Estimates and settings as dictionaries, through lists and dictionaries."""
    if isinstance(value, Estimate):
        return value.as_dict()
    if isinstance(value, Setting | Point):
        return as_json({name: getattr(value, name) for name in vars(value)})
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


def _by(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row[name]].append(row)
    return dict(found)


def _by_setting(rows: Iterable[Mapping[str, Any]]) -> dict[Setting, list[Mapping[str, Any]]]:
    found: dict[Setting, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[Setting(**{field.name: row[field.name] for field in fields(Setting)})].append(row)
    return dict(found)


def _order(setting: Setting) -> tuple[float, ...]:
    numbers = {name: value for name, value in asdict(setting).items() if name != "usual"}
    return tuple(-1.0 if value is None else value for value in numbers.values())


def _is_point(setting: Setting, rows: Sequence[Mapping[str, Any]], trials: TrialConfig) -> bool:
    if setting.image_guidance_scale is None:
        return True
    alone = len({row["image_guidance_scale"] for row in rows}) == 1
    if setting.image_guidance_scale not in trials.image_guidance_scales and not alone:
        return False
    scales = trials.text_guidance_scales
    return not scales or setting.text_guidance_scale in scales


def _values(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, float]:
    return {row["task_key"]: row[name] for row in rows if row[name] is not None}


assert set(SIMILARITIES) <= set(MEASURES)
