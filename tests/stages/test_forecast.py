"""What the plan of the pairs tells of figures; measuring them is tested with the job."""

from dataclasses import replace

import pytest

from ip2p_ray.stages.forecast import Forecast

PLAN = Forecast(
    triplets=1000,
    candidates=32_000,
    pairs=4000,
    asked_batch=16,
    batch_size=16,
    generator_seconds=0.45,
    judge_seconds=0.01,
    generators=4,
    cpu_generators=0,
    judges=1,
    triplet_bytes=1e6,
    pair_bytes=500e3,
    extrapolated=False,
    spared=False,
)


def test_hours_are_those_of_whoever_binds():
    assert PLAN.device_hours == pytest.approx(4.0)
    assert PLAN.hours == pytest.approx(1.0)
    assert not PLAN.judging
    slow = replace(PLAN, judge_seconds=0.225)
    assert slow.judging
    assert slow.hours == pytest.approx(2.0)
    assert replace(slow, judges=2).hours == pytest.approx(1.0)


def test_pictures_are_counted_in_candidates_and_again_in_pairs():
    assert "plan: at most 4.0 GB of pictures, 500.0 kB a pair in candidates" in PLAN.lines()[3]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"batch_size": 4}, "16 at a time do not fit"),
        ({"judge_seconds": 1.0}, "judging is what binds"),
        ({"triplet_bytes": 100e6}, "about 100.0 MB, go to the judge in one piece"),
        ({"cpu_generators": 3}, "what 3 generators without a GPU make comes off that"),
        ({"spared": True}, "what the options spare comes off that"),
        ({"extrapolated": True}, "measured over 2 to 6 steps"),
    ],
)
def test_what_a_user_should_know_is_told_only_then(change, told):
    assert told in "\n".join(replace(PLAN, **change).lines())
    assert told not in "\n".join(PLAN.lines())
