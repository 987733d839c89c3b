from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ip2p_ray.candidates import Candidates
from ip2p_ray.diffusion.noise import NoiseSchedule
from ip2p_ray.diffusion.sample import text_to_image
from ip2p_ray.errors import ConfigError
from ip2p_ray.pairs import (
    CandidateRequest,
    PairConfig,
    begin,
    candidate_latents,
    candidate_requests,
    generate_candidates,
    pair_controls,
    proceed,
)
from ip2p_ray.prompt_to_prompt.alignment import tokenize_caption
from ip2p_ray.prompt_to_prompt.blend import local_blend
from ip2p_ray.testing import (
    stable_diffusion_1_5,
    tiny_stable_diffusion,
)

CONFIG = PairConfig(resolution=16, steps=4, candidates=2, guidance_scale=(1.5, 4.0))
TRIPLETS = {
    "cat": ("a cat on the mat", "a chinchilla on the mat"),
    "boat": ("a photo of a boat", "a photo of a red boat at sea"),
    "same": ("a dog", "a dog"),
}


def requests_of(config: PairConfig = CONFIG) -> list[CandidateRequest]:
    return [
        request
        for key, (caption, edited_caption) in TRIPLETS.items()
        for request in candidate_requests(key, caption, edited_caption, config, "recipe")
    ]


def test_requests_are_the_same_anywhere_and_differ_among_themselves() -> None:
    requests = requests_of()
    assert requests == requests_of()
    assert len({request.seed for request in requests}) == 6
    assert len({request.self_replace for request in requests}) == 6
    other = candidate_requests("cat", *TRIPLETS["cat"], CONFIG, "another recipe")
    assert other[0].seed != requests[0].seed
    more = candidate_requests("cat", *TRIPLETS["cat"], replace(CONFIG, candidates=5), "recipe")
    assert more[:2] == requests[:2]


def test_settings_are_spread_over_their_ranges() -> None:
    config = PairConfig(candidates=400)
    requests = candidate_requests("key", "a", "b", config, "recipe")
    for name, low, high in (("self_replace", 0.1, 0.9), ("guidance_scale", 7.5, 15.0)):
        values = np.array([getattr(request, name) for request in requests])
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)
    assert [request.index for request in requests] == list(range(400))


@pytest.mark.parametrize(
    ("cross_replace", "sampler"), [(None, "euler_ancestral"), (0.6, "dpmpp_2m")]
)
def test_a_candidate_does_not_depend_on_its_neighbours(
    cross_replace: float | None, sampler: Any
) -> None:
    model = tiny_stable_diffusion()
    config = replace(CONFIG, cross_replace=cross_replace, sampler=sampler)
    requests = requests_of(config)
    together = candidate_latents(model, requests, config)
    pictures = generate_candidates(model, requests, config)
    assert all(images.shape == (6, 16, 16, 3) for images in pictures)
    index = 2
    alone = candidate_latents(model, [requests[index]], config)
    unit = max(1.0, alone.std().item())
    difference = (together[[index, 6 + index]] - alone).abs().max().item()
    assert difference <= 1e-5 * unit
    for some, one in zip(
        pictures, generate_candidates(model, [requests[index]], config), strict=True
    ):
        assert np.abs(some[index].astype(int) - one[0].astype(int)).max() <= 1


def test_without_copied_attention_both_pictures_are_plain_samples_of_one_seed() -> None:
    model = tiny_stable_diffusion()
    requests = [replace(request, self_replace=0.0) for request in requests_of()]
    source, edited = generate_candidates(model, requests, CONFIG)
    options: dict[str, Any] = {"height": 16, "width": 16, "steps": CONFIG.steps}
    seeds = [request.seed for request in requests]
    scales = [request.guidance_scale for request in requests]
    for pictures, captions in (
        (source, [request.caption for request in requests]),
        (edited, [request.edited_caption for request in requests]),
    ):
        plain = text_to_image(model, captions, seeds, guidance_scale=scales, **options)
        assert np.abs(pictures.astype(int) - plain.astype(int)).max() <= 1


def test_copied_attention_changes_the_edited_picture_only() -> None:
    model = tiny_stable_diffusion()
    requests = requests_of()
    free = [replace(request, self_replace=0.0) for request in requests]
    copied = candidate_latents(model, requests, CONFIG)
    plain = candidate_latents(model, free, CONFIG)
    assert torch.equal(copied[:6], plain[:6])
    assert all((copied[6 + row] - plain[6 + row]).abs().max() > 1e-3 for row in range(4))


def test_equal_captions_give_equal_pictures() -> None:
    model = tiny_stable_diffusion()
    config = replace(CONFIG, cross_replace=0.7)
    source, edited = generate_candidates(model, requests_of(config)[4:], config)
    assert np.abs(source.astype(int) - edited.astype(int)).max() <= 1


def test_cross_attention_follows_its_field() -> None:
    model = tiny_stable_diffusion()
    requests = requests_of()
    without = candidate_latents(model, requests, CONFIG)
    config = replace(CONFIG, cross_replace=0.8)
    across = candidate_latents(model, requests, config)
    assert torch.equal(across[:6], without[:6])
    assert (across[6] - without[6]).abs().max() > 1e-3
    nowhere = candidate_latents(model, requests, replace(CONFIG, cross_replace=0.0))
    assert torch.equal(nowhere, without)


def test_local_blend_keeps_the_source_elsewhere() -> None:
    model = tiny_stable_diffusion()
    requests = requests_of()[:1]
    (control,) = pair_controls(model, requests, CONFIG)
    source, target = (
        tokenize_caption(model.tokenizer, caption, model.text_length) for caption in TRIPLETS["cat"]
    )
    blend = local_blend(
        model.tokenizer, source, target, words=(["cat"], ["chinchilla"]), threshold=0.99
    )
    kept = replace(control, blend=blend)
    latents = candidate_latents(model, requests, CONFIG, controls=[kept], blend_downscale=2)
    plain = candidate_latents(model, requests, CONFIG)
    assert torch.equal(latents[0], plain[0])
    same = (latents[0] == latents[1]).all(0)
    assert 0 < same.float().mean() < 1
    none = replace(blend, threshold=1.0)
    latents = candidate_latents(
        model, requests, CONFIG, controls=[replace(control, blend=none)], blend_downscale=2
    )
    assert torch.equal(latents[1], latents[0])


def test_local_blend_in_a_run_in_parts_is_refused() -> None:
    model = tiny_stable_diffusion()
    requests = requests_of()[:1]
    source, target = (
        tokenize_caption(model.tokenizer, caption, model.text_length) for caption in TRIPLETS["cat"]
    )
    blend = local_blend(model.tokenizer, source, target, words=(["cat"], ["chinchilla"]))
    (control,) = pair_controls(model, requests, CONFIG)
    begun = begin(model, requests, CONFIG)
    with pytest.raises(ConfigError, match="LocalBlend needs all steps"):
        proceed(model, begun, CONFIG, stop=2, controls=[replace(control, blend=blend)])


SAMPLERS: list[tuple[Any, float | None]] = [
    ("euler", None),
    ("euler_ancestral", 0.6),
    ("dpmpp_2m", None),
]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item() / max(1.0, other.std().item())


@pytest.mark.parametrize(("sampler", "cross_replace"), SAMPLERS)
def test_a_run_in_parts_gives_the_bits_of_a_whole_one(
    sampler: Any, cross_replace: float | None
) -> None:
    model = tiny_stable_diffusion()
    config = replace(CONFIG, sampler=sampler, cross_replace=cross_replace)
    requests = requests_of(config)
    whole = candidate_latents(model, requests, config)
    part = begin(model, requests, config)
    for stop in (1, 3, 4):
        part = proceed(model, part, config, stop=stop)
        assert part.step == stop
    assert torch.equal(part.rows.x, whole)
    assert torch.equal(part.rows.denoised, whole)


@pytest.mark.parametrize(("sampler", "cross_replace"), SAMPLERS)
def test_rows_go_on_in_another_batch(sampler: Any, cross_replace: float | None) -> None:
    model = tiny_stable_diffusion()
    config = replace(CONFIG, sampler=sampler, cross_replace=cross_replace)
    requests = requests_of(config)
    whole = candidate_latents(model, requests, config)
    first = proceed(model, begin(model, requests[:4], config), config, stop=2)
    second = proceed(model, begin(model, requests[4:], config), config, stop=2)
    order = [5, 0, 3]
    mixed = Candidates.join([second.take([1]), first.take([0, 3])])
    assert mixed.requests == tuple(requests[place] for place in order)
    done = proceed(model, mixed, config)
    assert relative(done.rows.x, whole[[*order, *(6 + place for place in order)]]) <= 1e-5
    with pytest.raises(ConfigError, match="at one step"):
        Candidates.join([done, first])


@pytest.mark.parametrize(("sampler", "cross_replace"), SAMPLERS)
def test_a_shared_source_is_one_row_and_changes_nothing(
    sampler: Any, cross_replace: float | None
) -> None:
    model = tiny_stable_diffusion()
    config = replace(CONFIG, sampler=sampler, cross_replace=cross_replace, candidates=3)
    requests = [
        request
        for key in ("cat", "boat")
        for request in candidate_requests(key, *TRIPLETS[key], config, "recipe", share_source=2)
    ]
    part = begin(model, requests, config)
    assert part.source == (0, 0, 1, 2, 2, 3)
    assert part.rows.x.shape[0] == 4 + 6
    together = candidate_latents(model, requests, config)
    assert torch.equal(together[0], together[1])
    for place, request in enumerate(requests):
        alone = candidate_latents(model, [request], config)
        assert relative(together[[place, 6 + place]], alone) <= 1e-5
    half = proceed(model, part, config, stop=2).take([4, 1, 0])
    assert half.source == (0, 1, 1)
    done = proceed(model, half, config)
    assert relative(done.rows.x, together[[4, 0, 10, 7, 6]]) <= 1e-5


def test_candidates_of_a_group_differ_in_self_replace_only() -> None:
    config = replace(CONFIG, candidates=5)
    text = TRIPLETS["cat"]
    alone = candidate_requests("cat", *text, config, "recipe")
    shared = candidate_requests("cat", *text, config, "recipe", share_source=2)
    assert [request.seed for request in shared] == [alone[n].seed for n in (0, 0, 2, 2, 4)]
    for request, own, first in zip(shared, alone, [0, 0, 2, 2, 4], strict=True):
        assert (request.index, request.self_replace) == (own.index, own.self_replace)
        assert request.guidance_scale == alone[first].guidance_scale


def test_zero_terminal_snr_with_trailing_steps_is_finite() -> None:
    model = tiny_stable_diffusion(prediction_type="v_prediction")
    schedule = {**model.scheduler_config, "rescale_betas_zero_snr": True}
    model = replace(model, schedule=NoiseSchedule.from_config(schedule))
    config = replace(CONFIG, spacing="trailing")
    latents = candidate_latents(model, requests_of(), config)
    assert torch.isfinite(latents).all()
    assert latents.abs().max() < 1e3


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"resolution": -1}, "resolution must be"),
        ({"self_replace": (0.5, 1.5)}, r"self_replace must lie in \[0, 1\]"),
        ({"self_replace": (0.9, 0.1)}, "self_replace must be"),
        ({"guidance_scale": (-1.0, 2.0)}, "guidance_scale must be"),
        ({"cross_replace": 2.0}, "cross_replace must lie"),
        ({"sampler": "heun"}, "sampler must be one of"),
    ],
)
def test_wrong_settings_are_refused(setting: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PairConfig(**setting)


def test_no_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="no request"):
        candidate_latents(tiny_stable_diffusion(), [], CONFIG)


@pytest.mark.slow
@torch.inference_mode()
def test_weights_of_stable_diffusions_shape_pass_through() -> None:
    """Random weights of version 1.5's sizes: 320 to 1,280 channels, cross-attention 768."""
    model = stable_diffusion_1_5()
    config = replace(CONFIG, resolution=64, steps=2, cross_replace=0.5)
    requests = requests_of(config)[:1]
    assert model.latent_size(64, 64) == (8, 8)
    x = torch.randn(1, 4, 8, 8)
    denoised = model.denoise(x, torch.tensor([5.0]), model.encode_text(["a cat"]))
    assert torch.isfinite(denoised).all()
    source, edited = generate_candidates(model, requests, config)
    assert source.shape == edited.shape == (1, 64, 64, 3)
    assert source.std() > 0
