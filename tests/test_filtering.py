"""Which candidates stay, worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import NOT_BEST, Thresholds, rejection, select
from ip2p_ray.schema import SIMILARITIES

GOOD = dict(zip(SIMILARITIES, (0.3, 0.3, 0.9, 0.4), strict=True))
COSINES = st.floats(-1, 1, width=32)


def test_the_defaults_are_the_papers():
    assert Thresholds() == Thresholds(text=0.2, image=0.75, direction=0.2)


def test_a_similarity_at_its_threshold_suffices():
    exact = dict(zip(SIMILARITIES, (0.2, 0.2, 0.75, 0.2), strict=True))
    assert rejection(exact, Thresholds()) is None


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("value", [0.1, -1.0, math.nan])
def test_each_similarity_rejects_by_its_own_name(name, value):
    assert rejection({**GOOD, name: value}, Thresholds()) == name


def test_the_first_shortfall_is_the_reason():
    assert rejection(dict.fromkeys(SIMILARITIES, 0.0), Thresholds()) == "caption_similarity"
    both = {**GOOD, "image_similarity": 0.0, "direction_similarity": 0.0}
    assert rejection(both, Thresholds()) == "image_similarity"


def test_the_best_by_direction_are_kept_and_ties_go_to_the_lower_index():
    directions = (0.3, 0.5, 0.3, 0.1, 0.5)
    rows = [{**GOOD, "direction_similarity": value} for value in directions]
    assert select(rows, Thresholds(), keep=3) == [
        None,
        None,
        NOT_BEST,
        "direction_similarity",
        None,
    ]
    turned = [{**row, "index": index} for index, row in zip((9, 8, 0, 7, 6), rows, strict=True)]
    assert select(turned, Thresholds(), keep=3) == [
        NOT_BEST,
        None,
        None,
        "direction_similarity",
        None,
    ]


@given(st.lists(st.tuples(COSINES, COSINES, COSINES, COSINES), max_size=12), st.integers(1, 5))
def test_what_is_kept_passes_and_is_at_least_as_good_as_what_is_not(scores, keep):
    rows = [dict(zip(SIMILARITIES, values, strict=True)) for values in scores]
    reasons = select(rows, Thresholds(), keep)
    passing = [row for row in rows if rejection(row, Thresholds()) is None]
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    beaten = [row for row, reason in zip(rows, reasons, strict=True) if reason == NOT_BEST]
    assert len(kept) == min(keep, len(passing))
    assert len(kept) + len(beaten) == len(passing)
    if kept and beaten:
        worst = min(row["direction_similarity"] for row in kept)
        assert worst >= max(row["direction_similarity"] for row in beaten)


def test_what_could_not_be_computed_is_not_asked_for():
    assert rejection(dict.fromkeys(SIMILARITIES), Thresholds()) is None
    image_only = {**dict.fromkeys(SIMILARITIES), "image_similarity": 0.5}
    assert rejection(image_only, Thresholds()) == "image_similarity"
    rows = [{**GOOD, "direction_similarity": value, "index": None} for value in (None, 0.3, None)]
    assert select(rows, Thresholds(), keep=2) == [None, None, NOT_BEST]


def test_without_a_number_to_keep_all_that_pass_are_kept():
    rows = [GOOD] * 9 + [{**GOOD, "image_similarity": 0.1}]
    assert select(rows, Thresholds(), keep=None) == [None] * 9 + ["image_similarity"]
    assert select([], Thresholds(), keep=None) == []


def test_no_candidates_give_no_reasons():
    assert select([], Thresholds()) == []


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="threshold image is a cosine"):
        Thresholds(image=75)
    with pytest.raises(ConfigError, match="threshold text"):
        Thresholds(text=math.nan)
    with pytest.raises(ConfigError, match="keep is at least 1, got 0"):
        select([GOOD], Thresholds(), keep=0)
