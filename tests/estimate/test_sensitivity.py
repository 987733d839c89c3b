from dataclasses import replace

import pytest

from ip2p_ray.estimate.arithmetic import estimate
from ip2p_ray.estimate.sensitivity import CHANGES, OF_THE_PRICES, faster, sensitivity
from ip2p_ray.estimate.text import TOTALS
from tests.estimate.test_arithmetic import BASIS, PRICES, SPEEDS


def changed(name, **prices):
    return next(each for each in sensitivity(BASIS, prices.get("prices")) if each.name == name)


def test_twice_the_captions_is_twice_the_work():
    found = changed("captions")
    assert found.doubled.counts.candidates == 2 * estimate(BASIS).counts.candidates
    half = found.halved.stages[2].device_hours
    assert found.doubled.stages[2].device_hours == pytest.approx(4 * half)


def test_a_total_that_is_proportional_has_elasticity_one():
    rates = replace(SPEEDS, fixed={}, start=0.0)
    pairs_only = replace(
        BASIS,
        speeds=replace(
            faster(rates, 1.0),
            **{
                name: replace(getattr(rates, name), seconds=0.0)
                for name in ("caption", "latent", "sample", "answer_step", "score")
            },
        ),
    )
    found = {each.name: each for each in sensitivity(pairs_only)}
    hours = TOTALS["wall_hours"]
    assert found["candidates a triplet"].elasticity(hours) == pytest.approx(1.0)
    assert found["speed of devices"].elasticity(hours) == pytest.approx(-1.0)
    assert found["training steps"].elasticity(hours) == pytest.approx(0.0)
    # of 3.3 s a candidate 2 are its steps: between half and twice of them
    steps = found["sampling steps"].elasticity(TOTALS["device_hours"])
    assert 4**steps == pytest.approx((4 + 1.3) / (1 + 1.3))


def test_what_is_fixed_is_not_made_faster():
    quick = faster(SPEEDS, 4.0)
    assert quick.latent.seconds == SPEEDS.latent.seconds / 4
    assert quick.fixed == SPEEDS.fixed
    assert quick.score == SPEEDS.score  # no device explodes


def test_prices_change_the_cost_alone():
    found = changed("price of devices", prices=PRICES)
    assert found.halved.wall_hours == found.doubled.wall_hours
    held = found.doubled.cost.devices
    assert held == pytest.approx(4 * found.halved.cost.devices)
    assert found.doubled.cost.storage == found.halved.cost.storage


def test_without_prices_there_is_nothing_to_change_in_them():
    assert {each.name for each in sensitivity(BASIS)} == set(CHANGES) - set(OF_THE_PRICES)
    assert {each.name for each in sensitivity(BASIS, PRICES)} == set(CHANGES)


def test_a_share_does_not_leave_its_range():
    assert changed("acceptance").doubled.counts.pairs == estimate(BASIS).counts.pairs
