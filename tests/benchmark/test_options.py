from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from ip2p_ray.benchmark.comparison import FULL, Measured, table
from ip2p_ray.benchmark.options import Levels, measure_options
from ip2p_ray.clip import Clip
from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import Thresholds
from ip2p_ray.pairs import PairConfig
from ip2p_ray.search.generator import search
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.triplet import Candidate
from ip2p_ray.testing import tiny_stable_diffusion

ROWS = [
    {"triplet_key": f"{n}", "caption": f"a {thing}", "edited_caption": f"a {thing} in the snow"}
    for n, thing in enumerate(("cat", "dog", "house", "boat", "car", "mat"))
]
CONFIG = PairConfig(resolution=16, steps=4, candidates=8, keep=2, guidance_scale=(1.5, 4.0))
LEVELS = Levels(
    decide_every=4, stop_early=0.5, stop_margin=0.1, share_source=(2,), prune_at=(0.5,), lose=0.2
)
RECIPE = "recipe"


@pytest.fixture(scope="module")
def clip(tiny_weights: Path) -> Clip:
    return Clip.load(tiny_weights / "judge")


@pytest.fixture(scope="module")
def config(clip: Clip) -> PairConfig:
    """Half of all candidates pass."""
    found = made(clip, CONFIG, SearchConfig())
    scores = [(c.similarities or {})["direction_similarity"] for c in found.values()]
    thresholds = Thresholds(text=-1.0, image=-1.0, direction=float(np.median(scores)))
    return replace(CONFIG, thresholds=thresholds)


def made(clip: Clip, config: PairConfig, options: SearchConfig) -> dict[tuple[str, int], Candidate]:
    model = tiny_stable_diffusion()
    found = search(model, clip, ROWS[2:], config, options, RECIPE, batch_size=8)
    return {
        (one.triplet["triplet_key"], c.request.index): c for one in found for c in one.candidates
    }


@pytest.fixture(scope="module")
def measured(clip: Clip, config: PairConfig) -> dict[str, Measured]:
    return measure_options(
        tiny_stable_diffusion(),
        clip,
        ROWS[2:],
        ROWS[:2],
        config,
        LEVELS,
        recipe=RECIPE,
        batch_size=8,
    )


def test_full_generation_loses_nothing_and_the_rest_is_beside_it(
    measured: dict[str, Measured],
) -> None:
    assert list(measured) == [
        *(FULL, "stop_early", "give_up", "prune_at=0.5", "all but sharing"),
        *("share_source=2", "all"),
    ]
    full = measured[FULL]
    assert full.options == {}
    assert (full.candidates, full.pruned, full.never_made) == (4 * 8, 0, 0)
    assert full.unet_rows == 4 * 8 * 4 * 4
    assert (full.false_reject_rate, full.lost_pairs, full.lost_triplets) == (0, 0, 0)
    assert full.device_s_per_accepted_pair == full.device_s / full.pairs
    assert full.ended == {"all": 4}
    for one in measured.values():
        assert one.candidates + one.never_made == 32
        assert one.device_s > 0
        assert all(len(values) == 5 for values in one.quantiles.values())


def test_shared_sources_save_their_rows_and_are_other_candidates(
    measured: dict[str, Measured],
) -> None:
    shared = measured["share_source=2"]
    assert shared.unet_rows * 4 == measured[FULL].unet_rows * 3
    assert shared.false_reject_rate is None
    assert shared.lost_pairs is None
    assert shared.lost_triplets is not None
    assert 0 < shared.sources <= shared.pairs
    assert measured[FULL].sources == measured[FULL].pairs


def test_what_pruning_loses_is_counted_against_full_generation(
    clip: Clip, config: PairConfig, measured: dict[str, Measured]
) -> None:
    one = measured["prune_at=0.5"]
    full, pruned = (
        made(clip, config, SearchConfig()),
        made(clip, config, SearchConfig(**one.options)),
    )
    passed = {key for key, c in full.items() if c.reason in (None, "not_best")}
    kept = {key for key, c in full.items() if c.reason is None}
    lost = {key for key, c in pruned.items() if c.reason == "pruned"}
    assert one.pruned == len(lost) > 0
    assert one.false_reject_rate == len(passed & lost) / len(passed)
    still = {key for key, c in pruned.items() if c.reason is None}
    assert one.lost_pairs == len(kept - still) / len(kept)
    directions = [(pruned[key].similarities or {})["direction_similarity"] for key in still]
    assert one.quantiles["direction_similarity"][2] == pytest.approx(np.median(directions))
    assert one.unet_rows < measured[FULL].unet_rows


def test_the_table_and_the_json_hold_every_way(measured: dict[str, Measured]) -> None:
    lines = table(measured).splitlines()
    for name in measured:
        assert sum(line[:16].strip() == name for line in lines) == 1
        assert sum(f" {name} " in line for line in lines) >= 4
    content = json.loads(json.dumps({name: asdict(one) for name, one in measured.items()}))
    assert content[FULL]["pairs"] == measured[FULL].pairs


def test_a_way_without_pairs_has_no_figure_per_pair(measured: dict[str, Measured]) -> None:
    nothing = replace(
        measured[FULL],
        device_s_per_accepted_pair=None,
        unet_rows_per_accepted_pair=None,
        quantiles={name: [] for name in measured[FULL].quantiles},
    )
    first, *_ = (row for row in table({**measured, "x": nothing}).splitlines() if row[:2] == "x ")
    assert first.split()[2:6] == ["-"] * 4


def test_a_judge_that_lets_nothing_pass_has_no_margins(clip: Clip, config: PairConfig) -> None:
    strict = replace(config, thresholds=Thresholds(text=-1.0, image=-1.0, direction=1.0))
    with pytest.raises(ConfigError, match="no candidate of the pilots"):
        measure_options(
            tiny_stable_diffusion(),
            clip,
            ROWS[2:3],
            ROWS[:1],
            strict,
            LEVELS,
            recipe=RECIPE,
            batch_size=8,
        )
    with pytest.raises(ConfigError, match="prune_at"):
        Levels(prune_at=())


def test_pilots_are_other_triplets(clip: Clip, config: PairConfig) -> None:
    model = tiny_stable_diffusion()
    with pytest.raises(ConfigError, match="1 are the same"):
        measure_options(
            model, clip, ROWS[1:], ROWS[:2], config, LEVELS, recipe=RECIPE, batch_size=8
        )
