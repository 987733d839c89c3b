"""Thresholds for the miniature's judge: another CLIP has other cosines than ViT-L/14.

They are read off drawn pairs, whose truth is known: true pairs have to pass, and pairs whose
edited picture does not show the edit have to fail.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ip2p_ray.clip import Clip, Similarities
from ip2p_ray.filtering import Thresholds
from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.scenes import Edit, Scene, draw, random_edit, random_layout, random_scene

NAMES = (
    "caption_similarity",
    "edited_caption_similarity",
    "image_similarity",
    "direction_similarity",
)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    thresholds: Thresholds
    true_pass: float
    """Share of true pairs that pass, of pairs not used for calibration."""
    mismatched_fail: dict[str, float]
    """Share of each kind of mismatched pairs that fails."""


Wrong = Callable[[Scene, Edit, random.Random], Scene]


def _other_edit(scene: Scene, edit: Edit, rng: random.Random) -> Scene:
    while True:
        other = random_edit(scene, rng).edited
        if other.described != edit.edited.described:
            return other


def _unedited(scene: Scene, _edit: Edit, _rng: random.Random) -> Scene:
    return scene


def _other_layout(_scene: Scene, edit: Edit, rng: random.Random) -> Scene:
    """The right description, drawn elsewhere: no edit of this picture."""
    layout = random_layout(rng)
    while layout.first_left == edit.edited.layout.first_left:
        layout = random_layout(rng)
    return Scene(
        things=edit.edited.things,
        setting=edit.edited.setting,
        manner=edit.edited.manner,
        layout=layout,
    )


def _other_scene(_scene: Scene, _edit: Edit, rng: random.Random) -> Scene:
    return random_scene(rng)


MISMATCHES: dict[str, Wrong] = {
    "another edit of the scene": _other_edit,
    "the unedited scene": _unedited,
    "another scene": _other_scene,
}


def calibrate(clip: Clip, *, seed: int, count: int = 2_000, share: float = 0.965) -> Calibration:
    """The highest thresholds that `share` of the drawn true pairs pass, equally strict on each."""
    true = _scores(clip, seed, count, lambda scene, edit, rng: edit.edited)
    thresholds = _strictest(true, share)
    fresh = _scores(clip, seed + 1, count, lambda scene, edit, rng: edit.edited)
    failed = {
        name: 1 - _pass_rate(_scores(clip, seed + 2, count, wrong), thresholds)
        for name, wrong in MISMATCHES.items()
    }
    return Calibration(
        thresholds=thresholds, true_pass=_pass_rate(fresh, thresholds), mismatched_fail=failed
    )


def layout_mismatches(clip: Clip, thresholds: Thresholds, *, seed: int, count: int) -> float:
    """Share of rightly described but elsewhere drawn pictures that fail: CLIP hardly sees where."""
    return 1 - _pass_rate(_scores(clip, seed, count, _other_layout), thresholds)


def _scores(clip: Clip, seed: int, count: int, answer: Wrong) -> NDArray[np.float32]:
    """float32 (pair, similarity): the four cosines in the order of NAMES."""
    rng = random.Random(seed)
    rows = []
    for _ in range(0, count, 100):
        scenes = [random_scene(rng) for _ in range(100)]
        changes = [random_edit(scene, rng) for scene in scenes]
        texts = [grammar.triplet(s, e, rng) for s, e in zip(scenes, changes, strict=True)]
        shown = [answer(s, e, rng) for s, e in zip(scenes, changes, strict=True)]
        found: Similarities = clip.similarities(
            np.stack([draw(s) for s in scenes]),
            np.stack([draw(s) for s in shown]),
            [caption for caption, _, _ in texts],
            [edited for _, _, edited in texts],
        )
        rows.append(np.stack([getattr(found, name).cpu().numpy() for name in NAMES], axis=1))
    return np.concatenate(rows)


def _strictest(scores: NDArray[np.float32], share: float) -> Thresholds:
    best = Thresholds(text=-1, image=-1, direction=-1)
    for quantile in np.linspace(0.0, 1 - share, 60):
        text = float(np.quantile(scores[:, :2].min(axis=1), quantile))
        image, direction = (float(np.quantile(scores[:, k], quantile)) for k in (2, 3))
        trial = Thresholds(
            text=_floor(text), image=_floor(image), direction=_floor(direction)
        )
        if _pass_rate(scores, trial) >= share:
            best = trial
    return best


def _floor(value: float) -> float:
    return float(np.floor(value * 1000) / 1000)


def _pass_rate(scores: NDArray[np.float32], thresholds: Thresholds) -> float:
    least = np.array([thresholds.text, thresholds.text, thresholds.image, thresholds.direction])
    return float((scores >= least).all(axis=1).mean())
