"""Each text once, one of a place, and a sample, whatever the order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip2p_ray.distinct import (
    KEPT,
    NOT_SAMPLED,
    REPEATED,
    SAME_PLACE,
    Distinct,
    keep_distinct,
)
from ip2p_ray.errors import ConfigError, DatasetError

ROWS = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([None, "u", "v", "w"])))


def verdicts(rows, **options):
    distinct = Distinct()
    for text, place in rows:
        distinct.add(text, place)
    assert len(distinct) == len(rows)
    return distinct.verdicts(**options).tolist()


def kept(rows, **options):
    return [row for row, found in zip(rows, verdicts(rows, **options), strict=True) if not found]


def test_nothing_comes_of_nothing():
    assert verdicts([]) == []


def test_of_equal_rows_the_first_is_kept():
    assert verdicts([("a", None), ("b", None), ("a", None), ("a", None)]) == [
        KEPT,
        KEPT,
        REPEATED,
        REPEATED,
    ]


def test_a_text_with_a_place_goes_before_one_without():
    assert verdicts([("a", None), ("a", "u")]) == [REPEATED, KEPT]


def test_one_text_of_a_place_is_kept_unless_places_do_not_matter():
    rows = [("a", "u"), ("b", "u"), ("c", None), ("d", None)]
    assert sorted(verdicts(rows)[:2]) == [KEPT, SAME_PLACE]
    assert verdicts(rows)[2:] == [KEPT, KEPT]
    assert verdicts(rows, one_a_place=False) == [KEPT] * 4


@given(ROWS, st.randoms(use_true_random=False), st.integers(1, 4))
def test_the_order_does_not_matter(rows, random, sample):
    shuffled = random.sample(rows, len(rows))
    for options in ({}, {"sample": sample, "seed": 3}, {"one_a_place": False}):
        found = kept(rows, **options)
        assert sorted(map(str, found)) == sorted(map(str, kept(shuffled, **options)))
        assert len({text for text, _ in found}) == len(found)


@given(ROWS)
def test_no_text_and_no_place_is_kept_twice_and_none_is_lost_without_need(rows):
    found = kept(rows)
    places = [place for _, place in found if place is not None]
    assert len(set(places)) == len(places)
    assert {text for text, _ in kept(rows, one_a_place=False)} == {text for text, _ in rows}


def test_samples_of_one_seed_are_nested_and_of_another_differ():
    rows = [(f"text {n}", None) for n in range(400)]
    small, large = set(kept(rows, sample=50)), set(kept(rows, sample=60))
    assert len(small) == 50
    assert small < large
    assert len(large & set(kept(rows, sample=60, seed=1))) < 30
    assert kept(rows, sample=400) == kept(rows, sample=999) == rows
    assert verdicts(rows, sample=399).count(NOT_SAMPLED) == 1


def test_a_sample_is_drawn_evenly():
    rows = [(str(n), None) for n in range(1000)]
    counts = np.zeros(1000)
    for seed in range(40):
        counts += np.array(verdicts(rows, sample=500, seed=seed)) == KEPT
    # Binomial of 40 fair draws: mean 20, variance 10.
    assert counts.mean() == 20
    assert counts.var() == pytest.approx(10, rel=0.2)


def clean(row):
    return row.strip()


def reject(text):
    return "empty" if not text else None


def chosen(rows, **options):
    settings = {"sample": None, "seed": 0, **options}
    reasons = {REPEATED: "again", NOT_SAMPLED: "unsampled"}
    return list(keep_distinct(rows, clean, reject, lambda text: (text, None), reasons, **settings))


def test_every_row_comes_out_with_its_reason():
    assert chosen([" a", "", "b", "a ", " "]) == [
        ("a", None),
        ("", "empty"),
        ("b", None),
        ("a", "again"),
        ("", "empty"),
    ]
    assert [reason for _, reason in chosen(["a", "b", "c"], sample=1)].count("unsampled") == 2


def test_an_iterator_is_refused():
    with pytest.raises(ConfigError, match="read twice"):
        chosen(iter(["a"]))


class Changing:
    """Rows that are others every time."""

    def __init__(self, *counts):
        self.counts = list(counts)

    def __iter__(self):
        return iter("abcdef"[: self.counts.pop(0)])


@pytest.mark.parametrize(("counts", "told"), [((2, 3), "added"), ((3, 2), "removed")])
def test_rows_that_change_in_between_are_noticed(counts, told):
    with pytest.raises(DatasetError, match=f"rows were {told} while they were read"):
        chosen(Changing(*counts))
