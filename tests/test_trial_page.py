import re

import pytest

from ip2p_ray.intervals import Estimate
from ip2p_ray.trial_page import trials_page
from ip2p_ray.trials import SDEDIT, Point, Setting


def mean(value, low=None, high=None):
    return Estimate(
        mean=value,
        low=value - 0.1 if low is None else low,
        high=value + 0.1 if high is None else high,
        count=8,
        groups=8,
    )


def curve(name, numbers, step, **setting):
    """Points of which each has so much more direction similarity than the one before."""
    return [
        Point(
            setting=Setting(usual=False, **{name: number}, **setting),
            direction_similarity=mean(0.3 + step * place),
            image_similarity=mean(0.5),
        )
        for place, number in enumerate(numbers)
    ]


def page(**changes):
    told = {
        "title": "T",
        "facts": {"tasks": "8"},
        "table": {"mine": {"correct": mean(0.5)}, SDEDIT: {"correct": mean(0.25)}},
        "settings": {},
        "curves": {},
        "types": {},
        "differences": {},
        "first": "mine",
        "shown": [],
        "order": "by chance",
        "skipped": [],
    }
    return trials_page(**{**told, **changes})


def labels(text):
    """What is written in the plot beside its axes' numbers."""
    return re.findall(r'text-anchor="start">([^<]+)</text>', text)


def test_a_curve_is_numbered_at_its_ends_where_there_is_room():
    scales = {"text_guidance_scale": 7.5}
    wide = curve("image_guidance_scale", (1.0, 1.6, 2.2), 0.1, **scales)
    narrow = curve("strength", (0.3, 0.6, 0.9), 0.01)
    text = page(curves={"mine": [wide], SDEDIT: [narrow]})
    assert labels(text) == ["1", "2.2"]
    assert text.count("<circle") == 6
    assert "image_guidance_scale 1 to 2.2 at text_guidance_scale 7.5" in text
    assert "strength 0.3 to 0.9" in text


def test_two_curves_of_one_editor_are_told_apart():
    lines = [
        curve("image_guidance_scale", (1.0, 2.0), 0.1, text_guidance_scale=scale)
        for scale in (2.0, 5.0)
    ]
    text = page(curves={"mine": lines})
    assert "mine, text_guidance_scale 2" in text
    assert "mine, text_guidance_scale 5" in text


@pytest.mark.parametrize(("low", "high", "seen"), [(0.1, 0.3, 1), (-0.3, -0.1, 1), (-0.1, 0.2, 0)])
def test_a_difference_is_bold_where_its_interval_does_not_hold_zero(low, high, seen):
    told = {"correct": mean((low + high) / 2, low, high), "truth_l1": mean(0.0, -1.0, 1.0)}
    text = page(differences={"other": told})
    assert text.count('<td class="number seen">') == seen
    table = text[text.index("Compared with mine") :]
    assert table.index("forced choice") < table.index("L1 <span")
