from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from ip2p_ray.filtering import Thresholds
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.rules import chance_of_any, chance_of_better, hopeless, upper_tail

TABLE = [(6.3138, 1, 0.05), (4.3027, 2, 0.025), (2.3534, 3, 0.05), (2.7638, 10, 0.01)]


@pytest.mark.parametrize(("value", "freedom", "probability"), TABLE)
def test_the_tail_is_that_of_the_printed_tables(
    value: float, freedom: int, probability: float
) -> None:
    assert upper_tail(value, freedom) == pytest.approx(probability, rel=1e-3)
    assert upper_tail(-value, freedom) == pytest.approx(1 - probability, rel=1e-3)
    assert upper_tail(0.0, freedom) == 0.5


def better(scores: list[float], **changes: float) -> float:
    settings = {"made": 20, "left": 10, "bar": 0.2, **changes}
    return chance_of_better(scores, prior=(1.0, 1.0), **settings)  # type: ignore[arg-type]


def test_the_chance_of_a_better_one_by_hand() -> None:
    """Scores of mean 0.2 and deviation 0.1; over a bar of 0.2 there is a half of them."""
    once = 4 / 22 * 0.5
    assert better([0.1, 0.3, 0.2]) == pytest.approx(1 - (1 - once) ** 10)
    over = upper_tail(0.1 / (0.1 * math.sqrt(4 / 3)), 2)
    assert better([0.1, 0.3, 0.2], bar=0.3) == pytest.approx(1 - (1 - 4 / 22 * over) ** 10)


def test_a_search_with_too_few_accepted_is_never_enough() -> None:
    assert better([0.5, 0.6], bar=0.9) == 1
    assert better([0.5, 0.6, 0.7], left=0) == 0


def test_equal_scores_are_over_no_higher_bar() -> None:
    assert better([0.5] * 5, bar=0.51) == 0
    assert better([0.5] * 5, bar=0.5) > 0.5


def test_the_chance_falls_with_the_bar_and_with_what_is_left() -> None:
    scores = [0.2, 0.25, 0.3, 0.5, 0.52]
    assert better(scores, left=3) < better(scores, left=30)
    assert better(scores, bar=0.6) < better(scores, bar=0.5)
    assert better(scores, made=200) < better(scores)


def test_the_chance_of_any_by_hand() -> None:
    """A uniform prior: after n failures none of m more succeeds with (n + 1) / (n + m + 1)."""
    chance = chance_of_any(accepted=0, made=9, left=10, prior=(1.0, 1.0))
    assert chance == pytest.approx(10 / 20)
    assert chance_of_any(accepted=0, made=5, left=0, prior=(1.0, 1.0)) == 0
    some = chance_of_any(accepted=3, made=9, left=10, prior=(1.0, 1.0))
    assert some > chance


def test_the_stated_chances_are_those_of_simulated_triplets() -> None:
    rng = np.random.default_rng(0)
    share = rng.beta(0.4, 1.2, 40_000)
    first = rng.binomial(12, share) == 0
    then = rng.binomial(20, share[first])
    stated = chance_of_any(accepted=0, made=12, left=20, prior=(0.4, 1.2))
    assert (then > 0).mean() == pytest.approx(stated, abs=0.02)


def test_normal_scores_beat_the_bar_as_often_as_stated() -> None:
    """Whatever their mean and deviation; everything is accepted here."""
    rng = np.random.default_rng(1)
    came, stated = [], []
    for _ in range(3_000):
        scores = rng.normal(0.3, 0.1, 16)
        seen, later = scores[:6].tolist(), scores[6:]
        bar = sorted(seen)[-2] + 0.05
        came.append((later > bar).any())
        chance = better(seen, made=6, bar=bar, left=10)
        stated.append(chance)
    assert np.mean(came) == pytest.approx(statistics.fmean(stated), abs=0.06)


def test_a_prediction_below_any_of_its_floors_is_hopeless() -> None:
    thresholds = Thresholds(text=0.5, image=0.6, direction=0.7)
    options = SearchConfig(prune_at=0.5, prune_text=0.1, prune_image=None, prune_direction=0.2)
    names = (
        "caption_similarity",
        "edited_caption_similarity",
        "image_similarity",
        "direction_similarity",
    )
    for values, expected in (
        ((0.41, 0.41, -1.0, 0.51), False),
        ((0.39, 0.9, 0.9, 0.9), True),
        ((0.9, 0.39, 0.9, 0.9), True),
        ((0.9, 0.9, 0.9, 0.49), True),
        ((0.9, 0.9, math.nan, 0.9), False),
        ((0.9, 0.9, 0.9, math.nan), True),
    ):
        predicted = dict(zip(names, values, strict=True))
        assert hopeless(predicted, thresholds, options) is expected
