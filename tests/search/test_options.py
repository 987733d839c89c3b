from __future__ import annotations

from typing import Any

import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.pairs import PairConfig
from ip2p_ray.schema import recipe
from ip2p_ray.search.options import SearchConfig, search_recipe


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"stop_early": 0.0}, r"stop_early must lie in \(0, 1\)"),
        ({"give_up": 1.5}, "give_up must lie"),
        ({"prune_at": 1.0}, "prune_at must lie"),
        ({"stop_margin": -0.1}, "stop_margin is a difference"),
        ({"prune_text": 3.0}, "prune_text is a difference"),
        ({"acceptance_prior": (0.0, 1.0)}, "acceptance_prior must be above 0"),
        ({"share_source": 1}, "share_source must be at least 2"),
        ({"decide_every": 0}, "decide_every"),
        ({"give_up": 0.1, "share_source": 3}, "multiple of share_source, 3, got 8"),
    ],
)
def test_wrong_settings_are_refused(setting: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SearchConfig(**setting)


def test_every_option_is_part_of_the_recipe_and_none_changes_it() -> None:
    config = PairConfig()
    off = search_recipe(config, SearchConfig(), "model")
    assert off == recipe(config, "model")
    options = [
        SearchConfig(stop_early=0.1),
        SearchConfig(stop_early=0.1, stop_margin=0.05),
        SearchConfig(give_up=0.1),
        SearchConfig(give_up=0.1, acceptance_prior=(1.0, 1.0)),
        SearchConfig(give_up=0.1, decide_every=4),
        SearchConfig(share_source=2),
        SearchConfig(prune_at=0.5),
        SearchConfig(prune_at=0.5, prune_image=None),
    ]
    assert len({off, *(search_recipe(config, one, "model") for one in options)}) == 9


def test_there_is_always_a_step_before_and_after_pruning() -> None:
    assert SearchConfig().prune_step(1) is None
    half = SearchConfig(prune_at=0.5)
    assert [half.prune_step(steps) for steps in (2, 3, 12, 100)] == [1, 2, 6, 50]
    assert SearchConfig(prune_at=0.01).prune_step(10) == 1
    assert SearchConfig(prune_at=0.99).prune_step(10) == 9
    with pytest.raises(ConfigError, match="at least 2 steps"):
        half.prune_step(1)
