"""Candidates: pictures of a caption and of its edited caption that share their structure.

A request names everything that decides its two pictures, so they come out the same whatever
requests share its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ip2p_ray.diffusion.guidance import one_scale
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.noise import Spacing, row_generators, row_noise
from ip2p_ray.diffusion.sample import Sampler, check_sampler, sample
from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import Thresholds
from ip2p_ray.images import to_uint8
from ip2p_ray.prompt_to_prompt.alignment import tokenize_caption
from ip2p_ray.prompt_to_prompt.control import (
    CrossControl,
    PairControl,
    attention_control,
    cross_control,
    word_maps,
)
from ip2p_ray.prompt_to_prompt.processor import controlled_attention
from ip2p_ray.schema import candidate_seed, candidate_uniforms

Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How candidates are made and judged; the defaults are the paper's (appendix A.2)."""

    resolution: int = 512
    """Height and width of the pictures, in pixels."""
    steps: int = 100
    """Sampling steps of every picture; 25 do in practice."""
    sampler: Sampler = "euler_ancestral"
    """One of "euler", "euler_ancestral", "dpmpp_2m"."""
    spacing: Spacing = "linspace"
    """How the steps lie in time: "linspace" as in the paper's code, or "trailing"."""
    candidates: int = 100
    """Candidates of each triplet."""
    self_replace: tuple[float, float] = (0.1, 0.9)
    """Range of the fraction of steps, in [0, 1], that take the source's self-attention."""
    guidance_scale: tuple[float, float] = (7.5, 15.0)
    """Range of the guidance scale of both pictures."""
    cross_replace: float | None = None
    """Fraction of steps, in [0, 1], that take the source's cross-attention; None is the paper's."""
    keep: int = 4
    """At most so many candidates of a triplet become pairs."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    """Similarities that a pair must reach."""
    image_format: Literal["png"] = "png"
    """How pictures are stored."""

    def __post_init__(self) -> None:
        check_sampler(self.sampler)
        for name in ("resolution", "steps", "candidates", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("self_replace", "guidance_scale"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ConfigError(f"{name} must be 0 <= from <= to, got {(low, high)}")
        if self.self_replace[1] > 1:
            raise ConfigError(f"self_replace must lie in [0, 1], got {self.self_replace}")
        if self.cross_replace is not None and not 0 <= self.cross_replace <= 1:
            raise ConfigError(f"cross_replace must lie in [0, 1], got {self.cross_replace}")


@dataclass(frozen=True, kw_only=True)
class CandidateRequest:
    """One candidate that is to be made."""

    triplet_key: str
    """Whose candidate it is."""
    index: int
    """Which of the triplet's candidates, from 0."""
    caption: str
    """Text of the source image."""
    edited_caption: str
    """Text of the edited image."""
    seed: int
    """Of the noise both pictures share, in [0, 2**63)."""
    self_replace: float
    """Fraction of the steps, in [0, 1], that take the source's self-attention."""
    guidance_scale: float
    """Of both pictures."""


def candidate_requests(
    triplet_key: str, caption: str, edited_caption: str, config: PairConfig, recipe: str
) -> list[CandidateRequest]:
    """All candidates of a triplet; the same for the same triplet and recipe, anywhere."""
    requests = []
    for index in range(config.candidates):
        first, second = candidate_uniforms(triplet_key, index, recipe)
        requests.append(
            CandidateRequest(
                triplet_key=triplet_key,
                index=index,
                caption=caption,
                edited_caption=edited_caption,
                seed=candidate_seed(triplet_key, index, recipe),
                self_replace=_between(config.self_replace, first),
                guidance_scale=_between(config.guidance_scale, second),
            )
        )
    return requests


def pair_controls(
    model: StableDiffusion, requests: Sequence[CandidateRequest], config: PairConfig
) -> list[PairControl]:
    """How each request's edited picture follows its source."""
    controls = []
    for request in requests:
        cross = None
        if config.cross_replace is not None:
            cross = _cross(model, request, config.cross_replace)
        controls.append(PairControl(self_replace=request.self_replace, cross=cross))
    return controls


def generate_candidates(
    model: StableDiffusion,
    requests: Sequence[CandidateRequest],
    config: PairConfig,
    *,
    controls: Sequence[PairControl] | None = None,
    decode_batch: int | None = None,
) -> tuple[Pictures, Pictures]:
    """Source and edited pictures of the requests, each uint8 (request, height, width, 3).

    One batch of four rows a request, whatever their captions, seeds and settings. `controls`
    replaces what `pair_controls` says of them. `decode_batch` pictures are decoded at a time, by
    default as many as there are requests; decoding is what needs most memory.
    """
    with torch.inference_mode():
        latents = candidate_latents(model, requests, config, controls=controls)
        some = torch.split(latents, decode_batch or len(requests))
        pictures = np.concatenate([to_uint8(model.decode(part)) for part in some])
    return pictures[: len(requests)], pictures[len(requests) :]


@torch.inference_mode()
def candidate_latents(
    model: StableDiffusion,
    requests: Sequence[CandidateRequest],
    config: PairConfig,
    *,
    controls: Sequence[PairControl] | None = None,
    blend_downscale: int = 4,
) -> Tensor:
    """Scaled latents (2 x request, channel, height, width): all sources, then all edited.

    The two rows of a request share the initial noise, the noise of every step and the guidance
    scale; the edited row takes the source's self-attention, in all layers and with and without
    text, while `self_replace > step / (steps - 1)`. LocalBlend, where `controls` has any, reads
    the layers that are `blend_downscale` times smaller than the latents.
    Source: InstructPix2Pix section 3.1.2 and METHOD section 2.
    """
    if not requests:
        raise ConfigError("there is no request to generate")
    generators = row_generators([request.seed for request in requests] * 2)
    sigmas = model.schedule.sigmas(config.steps, spacing=config.spacing).to(model.device)
    size = model.latent_size(config.resolution, config.resolution)
    x = row_noise(generators, (model.latent_channels, *size)).to(model.device) * sigmas[0]
    text = _guidance_text(model, requests)
    scale = torch.tensor([request.guidance_scale for request in requests] * 2, device=x.device)
    pairs = pair_controls(model, requests, config) if controls is None else controls
    maps = word_maps(pairs, size, downscale=blend_downscale, device=model.device)
    at_step = (
        attention_control(pairs, step=step, steps=config.steps, device=model.device, maps=maps)
        for step in range(config.steps)
    )

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        twice = torch.cat([sigma, sigma])
        both = model.denoise(torch.cat([x, x]), twice, text, control=next(at_step))
        return one_scale(both[: x.shape[0]], both[x.shape[0] :], scale)

    def blended(step: int, x: Tensor) -> Tensor:
        return x if maps is None else maps.blend(x, step, config.steps)

    with controlled_attention(model.unet):
        return sample(
            guided, x, sigmas, sampler=config.sampler, generators=generators, after_step=blended
        )


def _guidance_text(model: StableDiffusion, requests: Sequence[CandidateRequest]) -> Tensor:
    """Text rows of a guided batch: without text twice, captions, edited captions."""
    wanted = [""] * (2 * len(requests))
    wanted += [request.caption for request in requests]
    wanted += [request.edited_caption for request in requests]
    distinct = list(dict.fromkeys(wanted))
    rows = [distinct.index(caption) for caption in wanted]
    return model.encode_text(distinct)[rows]


def _cross(model: StableDiffusion, request: CandidateRequest, span: float) -> CrossControl:
    source, target = (
        tokenize_caption(model.tokenizer, caption, model.text_length)
        for caption in (request.caption, request.edited_caption)
    )
    kind: Literal["replace", "refine"] = "refine"
    if len(source.words) == len(target.words):
        kind = "replace"
    return cross_control(model.tokenizer, source, target, kind=kind, spans=span)


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share
