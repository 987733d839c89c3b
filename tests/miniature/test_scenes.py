"""The drawn world: pictures, held-out combinations, edits."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from ip2p_ray.miniature.scenes import (
    EDIT_TYPES,
    WHOLE_WORLD,
    WORLD,
    Scene,
    Thing,
    World,
    draw,
    edits,
    is_held_out,
    random_edit,
    random_layout,
    random_scene,
)

WORLDS = pytest.mark.parametrize("world", [WORLD, WHOLE_WORLD], ids=["shipped", "whole"])


def scenes(world: World, count: int, *, held_out: bool = False) -> list[Scene]:
    rng = random.Random(7)
    return [random_scene(rng, world, held_out=held_out) for _ in range(count)]


@WORLDS
def test_a_scene_is_drawn_the_same_each_time(world: World) -> None:
    for scene in scenes(world, 20):
        picture = draw(scene)
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        np.testing.assert_array_equal(picture, draw(scene))


@WORLDS
def test_every_edit_is_visible(world: World) -> None:
    for scene in scenes(world, 8):
        source = draw(scene)
        for edit in edits(scene, world):
            assert not np.array_equal(source, draw(edit.edited)), edit


def test_colour_is_invisible_in_colourless_manners() -> None:
    rng = random.Random(0)
    for manner in ("sketch", "black and white"):
        one, other = (
            Scene(things=(Thing("boat", colour),), setting="sea", manner=manner, layout=layout)
            for layout in [random_layout(rng)]
            for colour in ("red", "blue")
        )
        np.testing.assert_array_equal(draw(one), draw(other))
        assert one.described == other.described


def test_held_out_combinations_cover_every_word_and_leave_most_for_training() -> None:
    combinations = [
        (s, c, p) for s in WORLD.subjects for c in WORLD.colours for p in WORLD.settings
    ]
    layout = random_layout(random.Random(0))
    held = [
        (s, c, p)
        for s, c, p in combinations
        if is_held_out(Scene(things=(Thing(s, c),), setting=p, manner="day", layout=layout))
    ]
    assert len(combinations) // 15 <= len(held) <= len(combinations) // 10
    assert {s for s, _, _ in held} == set(WORLD.subjects)
    assert {p for _, _, p in held} == set(WORLD.settings)
    assert len({c for _, c, _ in held}) >= 5


def test_training_scenes_show_no_held_out_combination() -> None:
    assert not any(map(is_held_out, scenes(WORLD, 500)))
    assert all(map(is_held_out, scenes(WORLD, 100, held_out=True)))


def test_edits_have_every_type_and_at_least_eight_alternatives() -> None:
    rng = random.Random(3)
    seen = set()
    for scene in scenes(WORLD, 200):
        assert len(list(edits(scene))) >= 9
        seen.add(random_edit(scene, rng).type)
    assert seen == set(EDIT_TYPES)


def test_an_edit_keeps_the_layout() -> None:
    for scene in scenes(WORLD, 30):
        assert all(edit.edited.layout == scene.layout for edit in edits(scene))


def test_removing_leaves_the_first_thing_where_it_was() -> None:
    layout = random_layout(random.Random(1))
    both = Scene(
        things=(Thing("cat", "red"), Thing("tree", "green")),
        setting="snow",
        manner="day",
        layout=layout,
    )
    removed = next(edit for edit in edits(both) if edit.type == "remove").edited
    assert removed == replace(both, things=both.things[:1])
