"""The reference's way against ours: other code, the same pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ip2p_ray.benchmark.reference import (
    materialised_attention,
    reference_candidates,
    reference_latents,
)
from ip2p_ray.pairs import (
    CandidateRequest,
    PairConfig,
    candidate_latents,
    candidate_requests,
    generate_candidates,
)
from ip2p_ray.testing import tiny_stable_diffusion

CONFIG = PairConfig(resolution=16, steps=5, candidates=2, guidance_scale=(1.5, 4.0))
TRIPLETS = {
    "cat": ("a cat on the mat", "a chinchilla on the mat"),
    "boat": ("a photo of a boat", "a photo of a red boat at sea"),
}


def requests_of() -> list[CandidateRequest]:
    made = [
        request
        for key, captions in TRIPLETS.items()
        for request in candidate_requests(key, *captions, CONFIG, "recipe")
    ]
    return [
        replace(made[0], self_replace=0.0),
        replace(made[1], self_replace=1.0),
        replace(made[2], self_replace=0.5),
        made[3],
    ]


def latents_of(model, requests: list[CandidateRequest]) -> torch.Tensor:
    captions = [request.caption for request in requests]
    captions += [request.edited_caption for request in requests]
    with torch.inference_mode(), materialised_attention(model.unet) as attention:
        text = model.encode_text([""] * len(captions) + captions)
        return reference_latents(model, requests, text, CONFIG, attention)


def apart(ours, theirs) -> int:
    pairs = zip(ours, theirs, strict=True)
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_both_ways_make_the_same_pictures(prediction_type: str, batch_size: int) -> None:
    model = tiny_stable_diffusion(prediction_type=prediction_type)
    requests = requests_of()
    ours = generate_candidates(model, requests, CONFIG)
    theirs = reference_candidates(model, requests, CONFIG, batch_size=batch_size)
    assert all(pictures.shape == (4, 16, 16, 3) for pictures in theirs)
    assert ours[0].std() > 1
    assert apart(ours, theirs) <= 1


def test_latents_are_equal_but_for_rounding_and_follow_self_replace() -> None:
    model = tiny_stable_diffusion()
    requests = requests_of()
    ours, theirs = candidate_latents(model, requests, CONFIG), latents_of(model, requests)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.std()
    free = latents_of(model, [replace(request, self_replace=0.0) for request in requests])
    assert torch.equal(free[:5], theirs[:5])
    changed = (free[5:] - theirs[5:]).abs().amax((1, 2, 3))
    assert (changed > 1e-4 * ours.std()).all()


def test_the_comparison_would_see_other_seeds() -> None:
    model = tiny_stable_diffusion()
    requests = requests_of()
    ours = generate_candidates(model, requests, CONFIG)
    seeded = [replace(request, seed=request.seed + 1) for request in requests]
    assert apart(ours, reference_candidates(model, seeded, CONFIG)) > 30


def test_the_models_own_processors_come_back() -> None:
    model = tiny_stable_diffusion()
    before = model.unet.attn_processors
    reference_candidates(model, requests_of()[:1], CONFIG)
    assert model.unet.attn_processors == before
