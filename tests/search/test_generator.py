from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.filtering import Thresholds, select
from ip2p_ray.pairs import PairConfig, candidate_requests, generate_candidates
from ip2p_ray.schema import SIMILARITIES
from ip2p_ray.search.generator import PairGenerator, search
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.schedule import schedule
from ip2p_ray.search.triplet import PRUNED, Searched
from ip2p_ray.testing import tiny_stable_diffusion

CONFIG = PairConfig(resolution=16, steps=4, candidates=6, keep=2, guidance_scale=(1.5, 4.0))
TRIPLETS = [
    {"triplet_key": "cat", "caption": "a cat on the mat", "edited_caption": "a dog on the mat"},
    {"triplet_key": "boat", "caption": "a photo of a boat", "edited_caption": "a red boat at sea"},
]
CLOSE = 2e-3
"""Cosines of pictures that differ by a grey level here and there, under a random CLIP."""


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return tiny_stable_diffusion()


@pytest.fixture(scope="module")
def clip(tiny_weights: Path) -> Clip:
    return Clip.load(tiny_weights / "judge")


def made_one_by_one(
    model: StableDiffusion, clip: Clip, row: dict[str, str], config: PairConfig
) -> tuple[Any, Any, list[dict[str, float]]]:
    """Pictures and scores of a triplet by the functions that know no search."""
    texts = (row["triplet_key"], row["caption"], row["edited_caption"])
    requests = candidate_requests(*texts, config, "recipe")
    source, edited = generate_candidates(model, requests, config)
    captions, edited_captions = ([text] * config.candidates for text in texts[1:])
    return source, edited, clip.similarities(source, edited, captions, edited_captions).rows()


@pytest.fixture(scope="module")
def config(model: StableDiffusion, clip: Clip) -> PairConfig:
    """With thresholds in the middle of the scores, so that some pass and some do not."""
    rows = [score for row in TRIPLETS for score in made_one_by_one(model, clip, row, CONFIG)[2]]
    middle = {name: float(np.median([row[name] for row in rows])) for name in SIMILARITIES}
    thresholds = Thresholds(text=-1.0, image=-1.0, direction=middle["direction_similarity"])
    return replace(CONFIG, thresholds=thresholds)


def run(
    model: StableDiffusion, clip: Clip, config: PairConfig, options: SearchConfig, batch_size: int
) -> dict[str, Searched]:
    found = search(model, clip, TRIPLETS, config, options, "recipe", batch_size=batch_size)
    return {one.triplet["triplet_key"]: one for one in found}


def test_with_all_options_off_it_is_generation_judging_and_selection_bit_for_bit(
    model: StableDiffusion, clip: Clip, config: PairConfig
) -> None:
    found = run(model, clip, config, SearchConfig(), batch_size=config.candidates)
    for row in TRIPLETS:
        source, edited, scores = made_one_by_one(model, clip, row, config)
        one = found[row["triplet_key"]]
        rows = [{**score, "index": place} for place, score in enumerate(scores)]
        reasons = select(rows, config.thresholds, config.keep)
        assert [c.reason for c in one.candidates] == reasons
        assert [c.similarities for c in one.candidates] == scores
        for place, c in enumerate(one.candidates):
            if c.reason is None:
                assert np.array_equal(c.source_image, source[place])  # type: ignore[arg-type]
                assert np.array_equal(c.edited_image, edited[place])  # type: ignore[arg-type]
    reasons = [c.reason for one in found.values() for c in one.candidates]
    assert None in reasons
    assert "direction_similarity" in reasons


def test_the_fill_of_each_batch_is_told(
    model: StableDiffusion, clip: Clip, config: PairConfig
) -> None:
    """12 candidates, 4 at a time, are 24 rows in batches of at most 8."""
    told: list[tuple[int, int]] = []
    found = search(
        *(model, clip, TRIPLETS, config, SearchConfig(), "recipe"),
        batch_size=4,
        filled=lambda rows, places: told.append((rows, places)),
    )
    assert len(list(found)) == 2
    assert {places for _, places in told} == {8}
    assert sum(rows for rows, _ in told) == 24


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
def test_finished_candidates_are_the_same_whatever_is_pruned_and_batched(
    model: StableDiffusion, clip: Clip, config: PairConfig, sampler: Any
) -> None:
    config = replace(config, sampler=sampler)
    full = run(model, clip, config, SearchConfig(), batch_size=config.candidates)
    options = SearchConfig(prune_at=0.5, prune_text=None, prune_image=None, prune_direction=0.0)
    for batch_size in (3, 5):
        found = run(model, clip, config, options, batch_size)
        seen = []
        for key, one in found.items():
            for mine, theirs in zip(one.candidates, full[key].candidates, strict=True):
                assert mine.request == theirs.request
                seen.append(mine.reason == PRUNED)
                for name, value in (mine.similarities or {}).items():
                    assert theirs.similarities is not None
                    assert abs(value - theirs.similarities[name]) <= CLOSE
        assert 0 < sum(seen) < len(seen)


def test_predictions_are_those_of_the_clean_latents_at_that_step(
    model: StableDiffusion, clip: Clip, config: PairConfig
) -> None:
    """One step before the end, with no more to come than the last, they are nearly the pictures."""
    late = SearchConfig(prune_at=0.99, prune_text=2.0, prune_image=2.0, prune_direction=2.0)
    early = replace(late, prune_at=0.01)
    distance = {}
    for name, options in (("late", late), ("early", early)):
        found = run(model, clip, config, options, batch_size=6)
        distance[name] = np.mean(
            [
                abs(c.predicted[kind] - c.similarities[kind])  # type: ignore[index]
                for one in found.values()
                for c in one.candidates
                for kind in SIMILARITIES[:3]
            ]
        )
    assert 0 < distance["late"] < distance["early"]


def test_a_shared_source_is_made_once(
    model: StableDiffusion, clip: Clip, config: PairConfig
) -> None:
    rows = {}
    for share in (None, 3):
        options = SearchConfig(share_source=share)
        generator = PairGenerator(model, clip, config, options)
        found = list(schedule(generator, TRIPLETS, config, options, "recipe", batch_size=6))
        rows[share] = generator.unet_rows
    assert rows[None] == 2 * 4 * 2 * 2 * 6
    assert rows[3] * (2 * 3) == rows[None] * (3 + 1)
    for one in found:
        texts = (str(one.triplet[n]) for n in ("triplet_key", "caption", "edited_caption"))
        key, caption, edited_caption = texts
        requests = candidate_requests(
            key, caption, edited_caption, config, "recipe", share_source=3
        )
        assert [c.request for c in one.candidates] == requests
        source, edited = generate_candidates(model, requests, config)
        captions = [caption] * 6, [edited_caption] * 6
        for c, row in zip(
            one.candidates, clip.similarities(source, edited, *captions).rows(), strict=True
        ):
            assert c.similarities is not None
            assert all(abs(c.similarities[name] - row[name]) <= CLOSE for name in SIMILARITIES)


def test_everything_together_runs_and_counts_its_work(
    model: StableDiffusion, clip: Clip, config: PairConfig
) -> None:
    options = SearchConfig(
        stop_early=0.5, give_up=0.5, decide_every=2, share_source=2, prune_at=0.5
    )
    generator = PairGenerator(model, clip, config, options)
    found = list(schedule(generator, TRIPLETS, config, options, "recipe", batch_size=4))
    made = [c for one in found for c in one.candidates]
    pruned = sum(c.reason == PRUNED for c in made)
    groups = len({(c.request.triplet_key, c.request.seed) for c in made})
    assert len(made) + sum(one.never_made for one in found) == 12
    whole = 2 * 4 * (groups + len(made))
    assert whole - 2 * 2 * (pruned + groups) <= generator.unet_rows <= whole - 2 * 2 * pruned
    assert torch.is_inference_mode_enabled() is False
