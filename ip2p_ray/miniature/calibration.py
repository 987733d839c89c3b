"""Thresholds for the miniature's judge: another CLIP has other cosines than ViT-L/14.

They are read off drawn pairs, whose truth is known: true pairs have to pass, and pairs whose
edited picture does not show the edit have to fail.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ip2p_ray.clip import Clip, Similarities
from ip2p_ray.filtering import Thresholds
from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.scenes import Edit, Scene, draw, random_edit, random_scene

NAMES = (
    "caption_similarity",
    "edited_caption_similarity",
    "image_similarity",
    "direction_similarity",
)

TRUE_PASS = 0.97
"""Share of drawn true pairs that the strictest thresholds let pass."""
MISMATCHED_FAIL = 0.98
"""Share of each kind of mismatched pairs that the loosest thresholds still fail."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Thresholds, and how well they tell true pairs from others."""

    thresholds: Thresholds
    true_pass: float
    """Share of true pairs of held-out scenes that pass."""
    mismatched_fail: dict[str, float]
    """Share of each kind of mismatched pairs of held-out scenes that fails."""


Wrong = Callable[[Scene, Edit, random.Random], Scene]


def _true(_scene: Scene, edit: Edit, _rng: random.Random) -> Scene:
    return edit.edited


def _other_edit(scene: Scene, edit: Edit, rng: random.Random) -> Scene:
    while True:
        other = random_edit(scene, rng).edited
        if other.described != edit.edited.described:
            return other


def _unedited(scene: Scene, _edit: Edit, _rng: random.Random) -> Scene:
    return scene


def _other_scene(_scene: Scene, _edit: Edit, rng: random.Random) -> Scene:
    return random_scene(rng)


MISMATCHES: dict[str, Wrong] = {
    "another edit of the scene": _other_edit,
    "the unedited scene": _unedited,
    "another scene": _other_scene,
}


def calibrate(clip: Clip, *, seed: int, count: int = 2_000) -> Calibration:
    """Thresholds between those that true pairs just pass and those that mismatched just fail.

    Drawn pictures are flawless and generated ones are not: the strictest thresholds would reject
    right pictures for their blur, the loosest let some wrong ones pass. The middle is taken.
    """
    true = _scores(clip, seed, count, _true)
    wrong = {
        name: _scores(clip, seed + 1 + k, count, answer)
        for k, (name, answer) in enumerate(MISMATCHES.items())
    }
    strictest = _strictest(true)
    drop = 0.0
    while drop < 1 and all(
        1 - _pass_rate(scores, _lowered(strictest, drop + 0.01)) >= MISMATCHED_FAIL
        for scores in wrong.values()
    ):
        drop += 0.01
    thresholds = _lowered(strictest, drop / 2)
    held_out = {
        name: _scores(clip, seed, count, answer, held_out=True)
        for name, answer in {"true": _true, **MISMATCHES}.items()
    }
    return Calibration(
        thresholds=thresholds,
        true_pass=_pass_rate(held_out["true"], thresholds),
        mismatched_fail={name: 1 - _pass_rate(held_out[name], thresholds) for name in MISMATCHES},
    )


def _scores(
    clip: Clip, seed: int, count: int, answer: Wrong, *, held_out: bool = False
) -> NDArray[np.float32]:
    """float32 (pair, similarity): the four cosines in the order of NAMES."""
    rng = random.Random(seed)
    rows = []
    for start in range(0, count, 100):
        drawn = min(100, count - start)
        scenes = [random_scene(rng, held_out=held_out) for _ in range(drawn)]
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


def _strictest(scores: NDArray[np.float32]) -> Thresholds:
    """The highest thresholds that TRUE_PASS of the pairs pass, equally strict on each."""
    best = Thresholds(text=-1, image=-1, direction=-1)
    for quantile in np.linspace(0.0, 1 - TRUE_PASS, 60):
        text = float(np.quantile(scores[:, :2].min(axis=1), quantile))
        image, direction = (float(np.quantile(scores[:, k], quantile)) for k in (2, 3))
        trial = Thresholds(text=_floor(text), image=_floor(image), direction=_floor(direction))
        if _pass_rate(scores, trial) >= TRUE_PASS:
            best = trial
    return best


def _lowered(thresholds: Thresholds, drop: float) -> Thresholds:
    """Text and direction thresholds lowered by `drop`; nothing separates the image's."""
    return replace(
        thresholds,
        text=_floor(max(thresholds.text - drop, -1.0)),
        direction=_floor(max(thresholds.direction - drop, -1.0)),
    )


def _floor(value: float) -> float:
    return float(np.floor(value * 1000) / 1000)


def _pass_rate(scores: NDArray[np.float32], thresholds: Thresholds) -> float:
    least = np.array([thresholds.text, thresholds.text, thresholds.image, thresholds.direction])
    return float((scores >= least).all(axis=1).mean())
