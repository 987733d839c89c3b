"""Keys are content, streams are apart, and none of them ever changes by accident."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip2p_ray import schema
from ip2p_ray.errors import ConfigError

TEXTS = st.text(max_size=6)
PARTS = st.lists(st.one_of(TEXTS, st.integers(-(2**70), 2**70)), max_size=4).map(tuple)


@dataclass(frozen=True, kw_only=True)
class Inner:
    text: float = 0.2


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 100
    scale: tuple[float, float] = (7.5, 15.0)
    off: float | None = None
    inner: Inner = field(default_factory=Inner)


def test_keys_and_seeds_are_what_they_always_were():
    key = schema.triplet_key("a cat", "make it a dog", "a dog")
    recipe = schema.recipe(Config(), "weights")
    assert schema.SCHEMA_VERSION == 2, "the values below belong to versions 1 and 2"
    assert schema.caption_key("a cat") == "63ed5137457ea5d9d94e169869c9a7c4"
    assert schema.reply_key("a cat", "model", recipe) == "99d9e011c6bb2ec66a58df7df48c2f41"
    assert key == "5eb41bb94c17925ea0942a16ef6621fd"
    assert recipe == "21b1b8cab09176fc"
    assert schema.pair_key(key, 3, recipe) == "805751e6331a891bf99d10e13e4d51d7"
    assert schema.candidate_seed(key, 3, recipe) == 5112641943756108309
    assert schema.candidate_uniforms(key, 3, recipe) == (0.07856285418247888, 0.5413566504040277)
    assert schema.stream_seed(0, 1, "noise") == 6056945191373716407


@given(st.tuples(TEXTS, TEXTS, TEXTS), st.tuples(TEXTS, TEXTS, TEXTS))
def test_triplet_keys_are_equal_only_for_equal_texts(left, right):
    assert (schema.triplet_key(*left) == schema.triplet_key(*right)) == (left == right)


def test_moving_a_letter_across_a_boundary_changes_every_key():
    assert schema.triplet_key("ab", "c", "d") != schema.triplet_key("a", "bc", "d")
    assert schema.reply_key("ab", "c", "d") != schema.reply_key("a", "bc", "d")
    assert schema.pair_key("k1", 2, "r") != schema.pair_key("k", 12, "r")
    assert schema.candidate_seed("k1", 2, "r") != schema.candidate_seed("k", 12, "r")
    assert schema.recipe(Config(), "ab", "c") != schema.recipe(Config(), "a", "bc")


def test_a_key_exists_for_text_that_utf8_cannot_hold():
    assert len(schema.caption_key("\ud800")) == 32


@given(PARTS, PARTS)
def test_streams_are_equal_only_for_equal_names(left, right):
    same = left == right and [*map(type, left)] == [*map(type, right)]
    assert (schema.stream_seed(*left) == schema.stream_seed(*right)) == same
    assert 0 <= schema.stream_seed(*left) < 2**63


def test_a_number_and_its_digits_name_different_streams():
    assert schema.stream_seed(1) != schema.stream_seed("1")
    assert schema.stream_seed(12, 3) != schema.stream_seed(1, 23)


@given(TEXTS, st.integers(0, 1000), TEXTS)
def test_candidates_draw_in_range_and_again_the_same(key, index, recipe):
    first = schema.candidate_uniforms(key, index, recipe)
    assert all(0.0 <= value < 1.0 for value in first)
    assert first == schema.candidate_uniforms(key, index, recipe)
    assert 0 <= schema.candidate_seed(key, index, recipe) < 2**63


def test_the_seed_and_the_two_uniforms_are_uniform_and_uncorrelated():
    draws = np.array(
        [
            (
                schema.candidate_seed("key", i, "r") / 2**63,
                *schema.candidate_uniforms("key", i, "r"),
            )
            for i in range(4000)
        ]
    )
    assert np.allclose(draws.mean(axis=0), 0.5, atol=0.02)
    assert np.allclose(draws.var(axis=0), 1 / 12, atol=0.005)
    assert np.allclose(np.corrcoef(draws.T), np.eye(3), atol=0.06)


def test_the_low_bits_of_seeds_differ_because_torch_uses_only_those():
    seeds = {schema.candidate_seed("key", index, "r") % 2**32 for index in range(4000)}
    assert len(seeds) > 3990


def test_a_recipe_is_of_values_not_of_how_they_were_written():
    assert schema.recipe(Config()) == schema.recipe(Config(scale=(7.5, 15)))
    assert schema.recipe(Config()) == schema.recipe(Config(steps=100.0))
    assert schema.recipe(Config()) != schema.recipe(Config(steps=101))
    assert schema.recipe(Config()) != schema.recipe(Config(inner=Inner(text=0.21)))
    assert schema.recipe(Config()) != schema.recipe(Config(), "weights")
    assert schema.recipe(Config(off=0.0)) != schema.recipe(Config(off=None))
    assert len(schema.recipe(Config())) == 16


@pytest.mark.parametrize("config", [{"steps": 1}, Config, Config(off={1, 2}), Config(off=np.nan)])
def test_a_recipe_refuses_what_json_cannot_hold(config):
    with pytest.raises(ConfigError):
        schema.recipe(config)


def test_splits_have_about_their_share_and_grow_without_exchange():
    keys = [schema.caption_key(str(number)) for number in range(4000)]
    small = {key for key in keys if schema.split_of(key) == "held_out"}
    large = {key for key in keys if schema.split_of(key, 0.2) == "held_out"}
    assert small < large
    assert abs(len(small) - 200) < 60
    assert {schema.split_of(key, 0.0) for key in keys} == {"train"}
    assert {schema.split_of(key, 1.0) for key in keys} == {"held_out"}
    with pytest.raises(ConfigError, match=r"in \[0, 1\], got 1.5"):
        schema.split_of(keys[0], 1.5)


@pytest.mark.parametrize("name", schema.DATASETS)
def test_every_schema_holds_rows_and_round_trips(name):
    columns = schema.DATASETS[name]
    assert len(set(columns.names)) == len(columns.names)
    table = pa.Table.from_pylist([dict.fromkeys(columns.names)], schema=columns)
    assert table.to_pylist() == [dict.fromkeys(columns.names)]


def test_a_candidate_row_carries_its_candidates_nested():
    image = {"bytes": b"png", "path": None}
    candidate = {"index": 0, "seed": 2**63 - 1, "reason": None, "source_image": image}
    row = {"triplet_key": "k", "status": "ok", "candidates": [candidate]}
    table = pa.Table.from_pylist([row], schema=schema.CANDIDATES)
    assert table.to_pylist()[0]["candidates"][0]["seed"] == 2**63 - 1
    assert table.to_pylist()[0]["candidates"][0]["source_image"] == image


def test_the_four_similarities_are_columns_wherever_candidates_are_rows():
    for dataset in ("pairs", "scores"):
        assert set(schema.SIMILARITIES) <= set(schema.DATASETS[dataset].names)
