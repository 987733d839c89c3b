from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import Thresholds
from ip2p_ray.pairs import CandidateRequest, PairConfig
from ip2p_ray.search.fitting import acceptance_prior, fit
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.rules import hopeless
from ip2p_ray.search.schedule import schedule
from ip2p_ray.search.triplet import Searched
from ip2p_ray.testing import ScriptedGenerator

THRESHOLDS = Thresholds(text=0.5, image=0.5, direction=0.5)
CONFIG = PairConfig(candidates=40, thresholds=THRESHOLDS)


@pytest.mark.parametrize("prior", [(0.3, 0.6), (4.0, 12.0)])
def test_the_prior_of_many_triplets_is_found_again(prior: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    counts = [(int(a), 30) for a in rng.binomial(30, rng.beta(*prior, 2_000))]
    yes, no = acceptance_prior(counts)
    assert yes / (yes + no) == pytest.approx(prior[0] / sum(prior), abs=0.02)
    assert yes + no == pytest.approx(sum(prior), rel=0.2)


def test_nothing_accepted_is_a_prior_too() -> None:
    yes, no = acceptance_prior([(0, 10)] * 5)
    assert 0 < yes < 0.1 * no


def test_candidates_of_one_source_count_once_for_the_prior() -> None:
    alone = SearchConfig(give_up=0.2)
    shared = SearchConfig(give_up=0.2, decide_every=40, share_source=40)
    found = pilots(SearchConfig())
    yes, no = fit(alone, found, THRESHOLDS).acceptance_prior
    assert 0.3 < yes / (yes + no) < 0.7  # of candidates
    yes, no = fit(shared, found, THRESHOLDS).acceptance_prior
    assert yes / (yes + no) > 0.9  # of sources


def score(request: CandidateRequest) -> dict[str, float]:
    """The text is always right, the image in half of the candidates."""
    good = request.seed % 2
    return {
        "caption_similarity": 0.9,
        "edited_caption_similarity": 0.8,
        "image_similarity": 0.6 if good else 0.1,
        "direction_similarity": 0.7,
    }


def predict(request: CandidateRequest) -> Mapping[str, float]:
    """Too low by up to 0.4 in text and direction; nothing is known of the image."""
    blur = 0.4 * (request.seed // 2 % 1000) / 1000
    made = score(request)
    return {name: value - blur for name, value in made.items()} | {"image_similarity": 0.55}


def pilots(options: SearchConfig) -> list[Searched]:
    rows = [{"triplet_key": f"{n}", "caption": "a", "edited_caption": "b"} for n in range(20)]
    generator = ScriptedGenerator(score, predict)
    return list(schedule(generator, rows, CONFIG, options, "recipe", batch_size=16))


PREDICTING = SearchConfig(prune_at=0.5, prune_text=None, prune_image=None, prune_direction=None)


@pytest.mark.parametrize("lose", [0.0, 0.3])
def test_margins_lose_no_more_than_that_of_the_accepted(lose: float) -> None:
    seen = pilots(PREDICTING)
    accepted = [
        c for one in seen for c in one.candidates if score(c.request)["image_similarity"] > 0.5
    ]
    assert len(accepted) > 300
    fitted = fit(replace(PREDICTING, stop_early=0.2), seen, THRESHOLDS, lose=lose)
    lost = [hopeless(c.predicted or {}, THRESHOLDS, fitted) for c in accepted]
    assert 0.3 * lose <= sum(lost) / len(lost) <= lose
    assert fitted.prune_image == 0.0
    assert fitted.prune_text is not None
    assert fitted.prune_direction is not None
    # blur of up to 0.4 takes the text from 0.8 to 0.4, the direction from 0.7 to 0.3
    assert fitted.prune_text == pytest.approx(0.1 - 0.4 * lose / 3, abs=0.02)
    assert fitted.prune_direction == pytest.approx(0.2 - 0.4 * lose / 3, abs=0.02)
    assert fitted.acceptance_prior != PREDICTING.acceptance_prior
    assert (fitted.stop_early, fitted.prune_at) == (0.2, 0.5)


def test_without_pruning_only_the_prior_is_fitted() -> None:
    options = SearchConfig(give_up=0.2)
    fitted = fit(options, pilots(SearchConfig()), THRESHOLDS)
    assert replace(fitted, acceptance_prior=options.acceptance_prior) == options
    assert sum(fitted.acceptance_prior) > 8  # all triplets are alike: half of each passes


def test_pilots_of_which_nothing_passes_give_no_margins() -> None:
    strict = Thresholds(text=0.99, image=0.99, direction=0.99)
    with pytest.raises(ConfigError, match="no candidate of the pilots was accepted"):
        fit(PREDICTING, pilots(PREDICTING), strict)
