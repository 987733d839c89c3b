"""The oracle is right about drawn pictures, noisy ones included."""

from __future__ import annotations

import random

import numpy as np

from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.oracle import judge_edit, reads_as
from ip2p_ray.miniature.scenes import draw, edits, random_edit, random_scene


def test_the_true_answer_is_correct_and_preserves_all() -> None:
    rng = random.Random(0)
    for _ in range(10):
        scene = random_scene(rng, held_out=True)
        edit = random_edit(scene, rng)
        verdict = judge_edit(draw(edit.edited), scene, edit)
        assert verdict.correct
        assert verdict.preservation_error == 0.0
        assert verdict.alternatives >= 8


def test_doing_nothing_and_another_edit_are_wrong() -> None:
    rng = random.Random(1)
    for _ in range(10):
        scene = random_scene(rng)
        edit = random_edit(scene, rng)
        assert not judge_edit(draw(scene), scene, edit).correct
        other = next(o for o in edits(scene) if o.edited.described != edit.edited.described)
        assert not judge_edit(draw(other.edited), scene, edit).correct


def test_preservation_counts_only_what_should_stay() -> None:
    rng = random.Random(2)
    scene = random_scene(rng)
    edit = next(e for e in edits(scene) if e.type == "swap")
    truth = draw(edit.edited)
    changed = (draw(scene) != truth).any(axis=-1)
    spoiled = truth.copy()
    spoiled[changed] = 255 - spoiled[changed]
    assert judge_edit(spoiled, scene, edit).preservation_error == 0.0
    spoiled = truth.astype(int)
    spoiled[~changed] += np.where(spoiled[~changed] < 128, 51, -51)
    verdict = judge_edit(spoiled.astype(np.uint8), scene, edit)
    assert abs(verdict.preservation_error - 0.2) < 1e-6


def test_a_picture_reads_as_its_own_caption_only() -> None:
    rng = random.Random(3)
    noise = np.random.default_rng(0)
    for _ in range(4):
        scene = random_scene(rng)
        picture = draw(scene).astype(float)
        noisy = (picture + noise.normal(0, 15, picture.shape)).clip(0, 255).astype(np.uint8)
        assert reads_as(noisy, grammar.describe(scene))
        edited = random_edit(scene, rng).edited
        assert not reads_as(draw(edited), grammar.describe(scene))
