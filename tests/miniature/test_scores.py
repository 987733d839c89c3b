"""Questions about held-out scenes, and scores whose values are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from ip2p_ray.errors import ConfigError
from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.scenes import (
    EDIT_TYPES,
    Layout,
    Scene,
    Thing,
    draw,
    edits,
    is_held_out,
)
from ip2p_ray.miniature.scores import (
    EditTask,
    chance,
    edit_tasks,
    random_captions,
    score_edits,
    score_judge,
    score_writer,
    source_pictures,
)
from ip2p_ray.miniature.tiny import true_edit
from ip2p_ray.triplets.prompt import completion

TASKS = edit_tasks(40, seed=1)


def true_pictures(tasks: Sequence[EditTask]) -> Any:
    return np.stack([draw(task.edit.edited) for task in tasks])


def test_the_same_seed_asks_the_same_and_another_does_not() -> None:
    assert edit_tasks(40, seed=1) == TASKS
    assert edit_tasks(5, seed=1) == TASKS[:5]
    assert edit_tasks(40, seed=2) != TASKS


def test_every_question_shows_a_held_out_combination_and_asks_a_true_edit() -> None:
    assert all(is_held_out(task.scene) for task in TASKS)
    for task in TASKS:
        assert grammar.is_true_edit(task.caption, task.instruction, task.edited_caption)
        assert grammar.parse_caption(task.caption) == grammar.describe(task.scene)
        assert grammar.parse_caption(task.edited_caption) == grammar.describe(task.edit.edited)
    assert {task.edit.type for task in TASKS} == set(EDIT_TYPES)


def test_copying_the_input_is_never_right_and_spoils_nothing() -> None:
    found = score_edits(source_pictures(TASKS), TASKS)
    assert found["forced_choice_accuracy"] == 0.0
    assert found["preservation_error"] == 0.0
    assert found["count"] == 40


def test_the_true_picture_is_always_right_and_spoils_nothing() -> None:
    found = score_edits(true_pictures(TASKS), TASKS)
    assert found["forced_choice_accuracy"] == 1.0
    assert found["preservation_error"] == 0.0
    assert found["by_type"] == dict.fromkeys(sorted(EDIT_TYPES), 1.0)


def test_shares_are_means_over_questions_and_over_those_of_a_type() -> None:
    answers = source_pictures(TASKS)
    swaps = [place for place, task in enumerate(TASKS) if task.edit.type == "swap"]
    answers[swaps[0]] = true_pictures(TASKS)[swaps[0]]
    found = score_edits(answers, TASKS)
    assert found["forced_choice_accuracy"] == pytest.approx(1 / 40)
    assert found["by_type"].pop("swap") == pytest.approx(1 / len(swaps))
    assert set(found["by_type"].values()) == {0.0}


def test_spoiling_everything_costs_as_much_as_was_spoiled() -> None:
    # Other edits change every pixel, so that none of those that are counted is left.
    tasks = [task for task in TASKS if task.edit.type in ("swap", "recolour", "add", "remove")]
    answers = true_pictures(tasks).astype(int)
    answers += np.where(answers < 128, 51, -51)
    found = score_edits(answers.astype(np.uint8), tasks)
    assert found["preservation_error"] == pytest.approx(0.2, abs=1e-6)


LAYOUT = Layout(left=18, right=46, baseline=53, size=28, first_left=True, backdrop=0)
BOAT = Scene(things=(Thing("boat", "red"),), setting="sea", manner="day", layout=LAYOUT)


@pytest.mark.parametrize(
    ("scene", "pictures"),
    [
        # Swap 7, recolour 5, setting 3, manner 2, add 7 x 6; and the scene itself.
        (BOAT, 60),
        # Nothing to recolour, no other manner, added things have no colour: 7 + 3 + 7 + 1.
        (replace(BOAT, manner="sketch"), 18),
        # Swaps 2 x 6, recolours 2 x 5, setting 3, manner 2, remove 1, and the scene.
        (replace(BOAT, things=(Thing("boat", "red"), Thing("cat", "blue"))), 29),
    ],
)
def test_chance_is_one_picture_of_all_that_are_shown(scene: Scene, pictures: int) -> None:
    edit = next(iter(edits(scene)))
    task = replace(TASKS[0], scene=scene, edit=edit)
    assert chance([task]) == pytest.approx(1 / pictures)


def test_chance_is_the_mean_over_questions() -> None:
    tasks = [
        replace(TASKS[0], scene=scene, edit=next(iter(edits(scene))))
        for scene in (BOAT, replace(BOAT, manner="sketch"))
    ]
    assert chance(tasks) == pytest.approx((1 / 60 + 1 / 18) / 2)


def test_captions_differ_and_none_is_held_out() -> None:
    found = random_captions(300, seed=0)
    assert len(set(found)) == len(found) == 300
    assert found[:50] == random_captions(50, seed=0)
    for caption in found:
        described = grammar.parse_caption(caption)
        assert described is not None
        colourless = any(not colour for _, colour in described.things)
        things = tuple(Thing(subject, colour or "red") for subject, colour in described.things)
        scene = replace(BOAT, things=things, setting=described.setting, manner=described.manner)
        assert colourless == scene.colourless
        assert not is_held_out(scene)


def test_more_captions_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most 50,000 .* got 50,001"):
        random_captions(50_001, seed=0)


@dataclass
class Judge:
    """Pairs picture k of those it is shown with text k + `shift`."""

    shift: int = 0
    asked: int = 0

    def encode_images(self, images: Any) -> torch.Tensor:
        self.asked += len(images)
        return torch.eye(len(images))

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        meanings = {grammar.parse_caption(text) for text in texts}
        assert len(meanings) == len(texts)
        return torch.eye(len(texts)).roll(self.shift, dims=0)


@pytest.mark.parametrize(("shift", "score"), [(0, 1.0), (1, 0.0)])
def test_a_judge_is_scored_by_the_pictures_that_find_their_caption(
    shift: int, score: float
) -> None:
    judge: Any = Judge(shift)
    assert score_judge(judge, seed=0, count=64, choices=16) == score
    assert judge.asked == 64


def test_a_judge_that_always_answers_the_same_is_right_once_in_all_choices() -> None:
    class Stuck(Judge):
        def encode_texts(self, texts: list[str]) -> torch.Tensor:
            return torch.arange(len(texts)).flip(0)[:, None] * torch.ones(len(texts))

    judge: Any = Stuck()
    assert score_judge(judge, seed=0, count=32, choices=16) == pytest.approx(1 / 16)


@dataclass
class Writer:
    """Replies by a rule."""

    reply: Callable[[str], str]

    def write(self, captions: Sequence[str], *, seed: int) -> list[str]:
        return [self.reply(caption) for caption in captions]


def off_the_point(caption: str) -> str:
    """A reply in the right form that says another thing than its instruction."""
    instruction, _ = true_edit(caption)
    return completion(instruction, "a white fish and a red rocket in the desert")


@pytest.mark.parametrize(
    ("reply", "parsed", "true"),
    [
        (lambda caption: completion(*true_edit(caption)), 1.0, 1.0),
        (off_the_point, 1.0, 0.0),
        (lambda caption: caption, 0.0, 0.0),
    ],
)
def test_a_writer_is_scored_by_form_and_by_truth(
    reply: Callable[[str], str], parsed: float, true: float
) -> None:
    writer: Any = Writer(reply)
    assert score_writer(writer, seed=0, count=32) == {"parsed": parsed, "true_edits": true}
