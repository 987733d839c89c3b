"""The miniature's exact ground truth: was the edit made, and was the rest left alone?

The world is drawn, so the true edited picture of every edit is known. An editor is scored by a
forced choice (is its picture nearer to the true one than to every other edit of that scene, and to
the unedited scene?) and by what it changed outside the region that had to change. Pictures made
from captions alone have no known layout; those are read by drawing every likely scene and taking
the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ip2p_ray.miniature.backdrops import VARIANTS
from ip2p_ray.miniature.grammar import Described
from ip2p_ray.miniature.scenes import (
    BASELINES,
    LEFT,
    RIGHT,
    SIZES,
    WORLD,
    Edit,
    Layout,
    Scene,
    Thing,
    World,
    draw,
    edits,
)

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Verdict:
    """The oracle's judgement of one edited picture."""

    correct: bool
    """Nearest to the true edited picture among all alternatives."""
    preservation_error: float
    """Mean absolute error on [0, 1] outside the region that had to change."""
    alternatives: int
    """How many pictures the true one was held against; chance is 1 / (alternatives + 1)."""


def judge_edit(picture: Picture, scene: Scene, edit: Edit, world: World = WORLD) -> Verdict:
    """Judge `picture`, uint8 (64, 64, 3), as the answer to `edit` of `scene`.

    It is held against `alternatives`.
    """
    source, truth = draw(scene), draw(edit.edited)
    others = alternatives(scene, edit, world)
    distance = _squared_error(picture, truth)
    correct = all(distance < _squared_error(picture, other) for other in others)
    unchanged = (source == truth).all(axis=-1)
    error = np.abs(picture.astype(np.float32) - truth.astype(np.float32))[unchanged] / 255.0
    return Verdict(correct, float(error.mean()) if error.size else 0.0, len(others))


def alternatives(scene: Scene, edit: Edit, world: World = WORLD) -> list[Picture]:
    """The pictures that the true edited one is told from.

    Every other edit of the scene that looks different, and the scene itself: an editor that does
    nothing is wrong.
    """
    truth = draw(edit.edited)
    others = [draw(scene)] + [draw(other.edited) for other in edits(scene, world) if other != edit]
    return [other for other in others if not np.array_equal(other, truth)]


def reads_as(picture: Picture, described: Described, world: World = WORLD) -> bool:
    """Whether what is described is the nearest reading of a picture of unknown layout.

    The rivals are all descriptions that are one edit away. Each gets the layout under which it
    fits the picture best.
    """
    layout, error = fit_layout(picture, described)
    scene = _scene(described, layout)
    for edit in edits(scene, world):
        rival = Described(*edit.edited.described)
        near = _fit_from(picture, rival, layout)
        if near < error:
            return False
    return True


def fit_layout(picture: Picture, described: Described) -> tuple[Layout, float]:
    """The layout under which the description is nearest to the picture, and its squared error."""
    best: tuple[float, Layout] | None = None
    for first_left in (True, False):
        start = Layout(
            left=LEFT[2], right=RIGHT[2], baseline=53, size=28, first_left=first_left, backdrop=1
        )
        layout, error = _descend(picture, described, start)
        if best is None or error < best[0]:
            best = (error, layout)
    assert best is not None
    return best[1], best[0]


def _fit_from(picture: Picture, described: Described, start: Layout) -> float:
    """The least squared error of the description near a layout, tried from both sides."""
    mirrored = replace(start, first_left=not start.first_left)
    return min(_descend(picture, described, layout)[1] for layout in (start, mirrored))


def _descend(picture: Picture, described: Described, layout: Layout) -> tuple[Layout, float]:
    """Coordinate descent over the layout's fields until none of them gains."""
    error = _squared_error(picture, draw(_scene(described, layout)))
    improved = True
    while improved:
        improved = False
        for candidate in _neighbours(layout):
            trial = _squared_error(picture, draw(_scene(described, candidate)))
            if trial < error:
                layout, error, improved = candidate, trial, True
    return layout, error


def _neighbours(layout: Layout) -> Iterator[Layout]:
    for backdrop in range(VARIANTS):
        yield replace(layout, backdrop=backdrop)
    for baseline in BASELINES:
        yield replace(layout, baseline=baseline)
    for size in SIZES:
        yield replace(layout, size=size)
    for left in LEFT:
        yield replace(layout, left=left)
    for right in RIGHT:
        yield replace(layout, right=right)


def _scene(described: Described, layout: Layout) -> Scene:
    # A colourless picture is drawn alike for every colour, so any colour will do.
    things = tuple(Thing(subject, colour or "white") for subject, colour in described.things)
    return Scene(things=things, setting=described.setting, manner=described.manner, layout=layout)


def _squared_error(a: Picture, b: Picture) -> float:
    difference = a.astype(np.int32) - b.astype(np.int32)
    return float(np.square(difference).mean())
