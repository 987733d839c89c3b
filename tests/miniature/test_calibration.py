"""Thresholds lie where a judge with known answers needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ip2p_ray.clip import Similarities
from ip2p_ray.filtering import Thresholds
from ip2p_ray.miniature import calibration
from ip2p_ray.miniature.calibration import MISMATCHES, calibrate

COUNT = 40
SEED = 5
TRUE = (0.30, 0.30, 0.80, 0.50)
"""Source with caption, edited with edited caption, image with image, change with change."""


class Judge:
    """Knows the right answer to questions that it has learned; any other answer is wrong.

    All right answers score the same, and so do all wrong ones.
    """

    def __init__(self, wrong: tuple[float, ...], *, held_out: bool = True) -> None:
        self.wrong = wrong
        self.answers: dict[tuple[bytes, str], bytes] = {}
        self.learning = True
        judge: Any = self
        for seed in range(SEED, SEED + 1 + len(MISMATCHES)):
            for unseen in (False, True)[: 1 + held_out]:
                calibration._scores(judge, seed, COUNT, calibration._true, held_out=unseen)
        self.learning = False

    def similarities(
        self, source: Any, edited: Any, _captions: list[str], edited_captions: list[str]
    ) -> Similarities:
        keys = [(s.tobytes(), text) for s, text in zip(source, edited_captions, strict=True)]
        shown = [picture.tobytes() for picture in edited]
        if self.learning:
            self.answers.update(zip(keys, shown, strict=True))
        right = [self.answers.get(key) == picture for key, picture in zip(keys, shown, strict=True)]
        rows = torch.tensor([TRUE if each else self.wrong for each in right])
        return Similarities(*rows.unbind(dim=1))


def calibrated(judge: Any) -> calibration.Calibration:
    return calibrate(judge, seed=SEED, count=COUNT)


def test_thresholds_lie_midway_between_true_and_mismatched_pairs() -> None:
    found = calibrated(Judge((0.30, 0.30, 0.80, 0.10)))
    assert found.thresholds.direction == pytest.approx(0.30, abs=0.01)
    assert found.thresholds.text == pytest.approx(0.10, abs=0.01)
    assert found.thresholds.image == pytest.approx(0.80, abs=1e-3)
    assert found.true_pass == 1.0
    assert found.mismatched_fail == dict.fromkeys(MISMATCHES, 1.0)


def test_a_text_that_does_not_fit_is_enough_to_fail() -> None:
    found = calibrated(Judge((0.30, -0.10, 0.80, 0.50)))
    assert found.thresholds.text == pytest.approx(0.10, abs=0.01)
    assert found.mismatched_fail == dict.fromkeys(MISMATCHES, 1.0)


def test_a_judge_that_sees_no_difference_is_reported_as_one() -> None:
    found = calibrated(Judge(TRUE))
    assert found.thresholds == Thresholds(text=0.30, image=0.80, direction=0.50)
    assert found.true_pass == 1.0
    assert found.mismatched_fail == dict.fromkeys(MISMATCHES, 0.0)


def test_what_is_reported_is_of_held_out_scenes() -> None:
    """A judge that knows training scenes only finds no right answer among the others."""
    found = calibrated(Judge((0.30, 0.30, 0.80, 0.10), held_out=False))
    assert found.thresholds.direction == pytest.approx(0.30, abs=0.01)
    assert found.true_pass == 0.0
    assert found.mismatched_fail == dict.fromkeys(MISMATCHES, 1.0)


def test_any_number_of_pairs_is_judged() -> None:
    judge: Any = Judge(TRUE)
    for count in (3, 101):
        assert calibration._scores(judge, SEED, count, calibration._true).shape == (count, 4)


def ramps(*columns: range) -> NDArray[np.float32]:
    """A thousand pairs of similarity 1 but for a ramp 0, 0.01, ... in some rows of each column.

    The columns are edited caption, image and direction.
    """
    scores = np.ones((1000, 4), dtype=np.float32)
    for column, rows in enumerate(columns, start=1):
        scores[rows.start : rows.stop, column] = np.arange(len(rows)) / 100
    return scores


def test_the_strictest_thresholds_fail_as_many_true_pairs_as_they_may() -> None:
    scores = np.ones((1000, 4), dtype=np.float32)
    scores[:, 3] = np.arange(1000) / 1000
    found = calibration._strictest(scores)
    assert (found.text, found.image) == (1.0, 1.0)
    # 970 of the 1000 values are 0.030 and more; a quantile between two values is rounded down.
    assert found.direction == pytest.approx(0.0295, abs=0.0006)


def test_the_strictest_thresholds_are_equally_strict_on_each_similarity() -> None:
    scores = ramps(range(100), range(100, 200), range(200, 300))
    found = calibration._strictest(scores)
    # 30 pairs may fail, ten by each: those of 0.00 to 0.09.
    assert found.text == found.image == found.direction == pytest.approx(0.095, abs=0.006)
    assert calibration._pass_rate(scores, found) >= calibration.TRUE_PASS


def test_pairs_that_fail_on_all_counts_are_counted_once() -> None:
    scores = ramps(range(100), range(100), range(100))
    found = calibration._strictest(scores)
    assert found.text == found.image == found.direction == pytest.approx(0.295, abs=0.006)


def test_lowering_spares_the_image_and_ends_at_minus_one() -> None:
    first = Thresholds(text=0.3, image=0.8, direction=0.25)
    assert calibration._lowered(first, 0.0) == first
    lowered = calibration._lowered(first, 0.125)
    assert lowered == Thresholds(text=0.175, image=0.8, direction=0.125)
    assert calibration._lowered(first, 2.0) == Thresholds(text=-1.0, image=0.8, direction=-1.0)


def test_a_pair_passes_when_no_similarity_is_below_its_threshold() -> None:
    least = Thresholds(text=0.25, image=0.5, direction=0.125)
    rows = [
        (0.25, 0.25, 0.5, 0.125),
        (0.24, 0.25, 0.5, 0.125),
        (0.25, 0.24, 0.5, 0.125),
        (0.25, 0.25, 0.49, 0.125),
        (0.25, 0.25, 0.5, 0.124),
    ]
    assert calibration._pass_rate(np.array(rows, dtype=np.float32), least) == 0.2
