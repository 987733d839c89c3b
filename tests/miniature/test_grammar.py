"""What the grammar writes it can read, and only true edits pass."""

from __future__ import annotations

import random

import pytest

from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.scenes import WHOLE_WORLD, WORLD, World, edits, random_edit, random_scene

WORLDS = pytest.mark.parametrize("world", [WORLD, WHOLE_WORLD], ids=["shipped", "whole"])


@WORLDS
def test_every_caption_is_read_back(world: World) -> None:
    rng = random.Random(0)
    for _ in range(300):
        described = grammar.describe(random_scene(rng, world))
        text = grammar.caption(described, grammar.random_wording(rng))
        assert grammar.parse_caption(text) == described, text


@WORLDS
def test_every_triplet_is_a_true_edit(world: World) -> None:
    rng = random.Random(1)
    for _ in range(300):
        scene = random_scene(rng, world)
        triplet = grammar.triplet(scene, random_edit(scene, rng, world), rng)
        assert grammar.is_true_edit(*triplet), triplet


def test_the_caption_of_another_edit_is_no_true_edit() -> None:
    rng = random.Random(2)
    for _ in range(100):
        scene = random_scene(rng)
        edit = random_edit(scene, rng)
        caption, instruction, edited = grammar.triplet(scene, edit, rng)
        assert not grammar.is_true_edit(caption, instruction, caption)
        for other in edits(scene):
            if other.edited.described != edit.edited.described:
                wrong = grammar.caption(grammar.describe(other.edited), grammar.Wording(0, 0, 0))
                assert wrong == edited or not grammar.is_true_edit(caption, instruction, wrong)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a boat on the sea",  # a coloured manner names the colour
        "a pencil sketch of a red boat on the sea",  # a sketch has none
        "a red boat and a blue boat on the sea",
        "a red boat",
        "a red boat on the moon",
        "a pencil sketch of a boat on the sea at night",
        "red boat on the sea",
    ],
)
def test_other_sentences_are_not_captions(text: str) -> None:
    assert grammar.parse_caption(text) is None


@pytest.mark.parametrize(
    ("instruction", "edited"),
    [
        ("turn the boat into a cat", "a red cat on the sea"),
        ("make the boat blue", "a blue boat on the sea"),
        ("move it to the desert", "a red boat among the dunes"),
        ("let night fall", "a red boat at sea under the stars"),
        ("draw it with a pencil", "a pencil drawing of a boat on the sea"),
        ("add a white house", "a red boat and a white house on the sea"),
    ],
)
def test_worked_examples(instruction: str, edited: str) -> None:
    assert grammar.is_true_edit("a red boat on the sea", instruction, edited)


@pytest.mark.parametrize(
    "instruction",
    [
        "turn the cat into a fish",  # there is no cat
        "make the boat red",  # it is
        "move it to the sea",  # it is there
        "make it day",  # it is
        "remove the boat",  # nothing would be left
        "add a green boat",  # there is one
        "add a house",  # of which colour?
        "do something nice",
    ],
)
def test_impossible_instructions_lead_nowhere(instruction: str) -> None:
    described = grammar.parse_caption("a red boat on the sea")
    assert described is not None
    assert grammar.apply_instruction(described, instruction) is None


def test_there_are_many_wordings() -> None:
    rng = random.Random(5)
    scene = random_scene(rng)
    edit = next(edit for edit in edits(scene) if edit.type == "swap")
    wordings = {grammar.triplet(scene, edit, rng)[1] for _ in range(100)}
    assert len(wordings) >= 5
