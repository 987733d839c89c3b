"""Batches of drawn scenes: nothing held out, and every step has a stream of its own."""

from __future__ import annotations

import random

import torch

from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.feed import captions, pictures, scene_batch, step_random, training_edit
from ip2p_ray.miniature.scenes import EDIT_TYPES, draw, is_held_out, random_edit


def test_a_steps_stream_is_the_same_whatever_was_drawn_before() -> None:
    first = [step_random("judge", 3, step).random() for step in range(5)]
    again = {step: step_random("judge", 3, step).random() for step in reversed(range(5))}
    assert first == [again[step] for step in range(5)]


def test_run_seed_step_and_process_have_streams_of_their_own() -> None:
    streams = [
        step_random("judge", 3, 7),
        step_random("writer", 3, 7),
        step_random("judge", 4, 7),
        step_random("judge", 3, 8),
        step_random("judge", 3, 7, rank=1),
        step_random("judge", 3, 7, rank=2),
    ]
    assert len({stream.random() for stream in streams}) == len(streams)
    assert step_random("judge", 3, 7, rank=0).random() == step_random("judge", 3, 7).random()


def test_training_shows_no_held_out_combination_before_or_after_an_edit() -> None:
    rng = random.Random(0)
    scenes = scene_batch(rng, 400)
    found = [training_edit(scene, rng) for scene in scenes]
    assert not any(is_held_out(scene) for scene in scenes)
    assert not any(is_held_out(edit.edited) for edit in found)
    assert {edit.type for edit in found} == set(EDIT_TYPES)
    # Edits at large lead to held-out combinations from the same scenes.
    assert any(is_held_out(random_edit(scene, rng).edited) for scene in scenes)


def test_a_held_out_batch_shows_nothing_else() -> None:
    assert all(is_held_out(scene) for scene in scene_batch(random.Random(0), 50, held_out=True))


def test_pictures_are_the_drawn_ones_between_minus_one_and_one() -> None:
    scenes = scene_batch(random.Random(0), 3)
    found = pictures(scenes)
    assert found.shape == (3, 3, 64, 64)
    assert found.dtype == torch.float32
    for picture, scene in zip(found, scenes, strict=True):
        levels = ((picture + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert (levels == draw(scene)).all()


def test_captions_say_what_is_drawn_in_several_wordings() -> None:
    rng = random.Random(0)
    scenes = scene_batch(rng, 100)
    for scene, caption in zip(scenes, captions(scenes, rng), strict=True):
        assert grammar.parse_caption(caption) == grammar.describe(scene)
    assert len(set(captions([scenes[0]] * 50, rng))) > 1
