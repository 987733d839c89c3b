import numpy as np
import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.intervals import BootstrapConfig, difference, estimate

CONFIG = BootstrapConfig(resamples=4000)


def test_of_nothing_nothing_is_said_and_of_one_group_no_interval():
    assert estimate([], [], CONFIG) is None
    found = estimate([1.0, 3.0], ["a", "a"], CONFIG)
    assert (found.mean, found.low, found.high, found.count, found.groups) == (2.0, None, None, 2, 1)


def test_the_interval_is_that_of_the_mean_of_independent_values():
    values = np.random.default_rng(3).normal(size=400)
    found = estimate(values.tolist(), [str(place) for place in range(400)], CONFIG)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_values_of_one_group_count_once():
    values = np.random.default_rng(4).normal(size=50).tolist()
    alone = estimate(values, [str(place) for place in range(50)], CONFIG)
    repeated = estimate(values * 9, [str(place) for place in range(50)] * 9, CONFIG)
    naive = estimate(values * 9, [str(place) for place in range(450)], CONFIG)
    assert repeated.count == 450
    assert repeated.groups == 50
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))
    assert naive.high - naive.low < 0.5 * (repeated.high - repeated.low)


def test_large_groups_weigh_more():
    found = estimate([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"], CONFIG)
    assert found.mean == 0.25
    assert (found.low, found.high) == (0.0, 1.0)


def test_order_does_not_matter_and_the_seed_does():
    rng = np.random.default_rng(5)
    values, groups = rng.normal(size=60).tolist(), [str(place // 3) for place in range(60)]
    order = rng.permutation(60)
    found = estimate(values, groups, CONFIG)
    assert estimate([values[i] for i in order], [groups[i] for i in order], CONFIG) == found
    assert estimate(values, groups, BootstrapConfig(resamples=4000, seed=1)).low != found.low


def test_a_difference_is_taken_pair_by_pair():
    hard = {str(place): float(place % 7) for place in range(70)}
    better = {key: value + 0.5 for key, value in hard.items()} | {"only here": 9.0}
    groups = {key: key for key in better}
    found = difference(better, hard, groups, CONFIG)
    assert (found.mean, found.low, found.high, found.count) == (0.5, 0.5, 0.5, 70)
    assert difference({"a": 1.0}, {"b": 1.0}, {"a": "a", "b": "b"}, CONFIG) is None


@pytest.mark.parametrize(
    ("changes", "told"), [({"level": 1.0}, "level"), ({"resamples": 9}, "resamples")]
)
def test_what_makes_no_interval_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        BootstrapConfig(**changes)
    with pytest.raises(ConfigError, match="2 values but 1 groups"):
        estimate([1.0, 2.0], ["a"], CONFIG)
