"""Candidates: pictures of a caption and of its edited caption that share their structure.

A request names everything that decides its two pictures, so they come out the same whatever
requests share its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ip2p_ray.candidates import CandidateRequest as CandidateRequest
from ip2p_ray.candidates import Candidates
from ip2p_ray.diffusion.guidance import one_scale
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.noise import Spacing, row_generators, row_noise
from ip2p_ray.diffusion.sample import Progress, Sampler, advance, check_sampler
from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import Thresholds
from ip2p_ray.images import ImageFormat, to_uint8
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
    image_format: ImageFormat = "png"
    """How pictures are stored; they are judged before."""

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
        if self.image_format not in get_args(ImageFormat):
            raise ConfigError(f"image_format is png or jpeg, got {self.image_format!r}")


def candidate_requests(
    triplet_key: str,
    caption: str,
    edited_caption: str,
    config: PairConfig,
    recipe: str,
    *,
    share_source: int = 1,
) -> list[CandidateRequest]:
    """All candidates of a triplet; the same for the same triplet and recipe, anywhere.

    Each `share_source` of them in a row have one source picture: seed and guidance scale are those
    of the first, and only self_replace differs.
    """
    requests = []
    for index in range(config.candidates):
        leader = index - index % share_source
        first, _ = candidate_uniforms(triplet_key, index, recipe)
        _, second = candidate_uniforms(triplet_key, leader, recipe)
        requests.append(
            CandidateRequest(
                triplet_key=triplet_key,
                index=index,
                caption=caption,
                edited_caption=edited_caption,
                seed=candidate_seed(triplet_key, leader, recipe),
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


def begin(
    model: StableDiffusion, requests: Sequence[CandidateRequest], config: PairConfig
) -> Candidates:
    """Candidates before their first step.

    Requests that agree in caption, seed and guidance scale have the same source picture, and it is
    made once: their edited pictures follow the same row. The rows of a request share the initial
    noise and the noise of every step.
    """
    if not requests:
        raise ConfigError("there is no request to generate")
    looks = [(request.caption, request.seed, request.guidance_scale) for request in requests]
    sources = list(dict.fromkeys(looks))
    seeds = [seed for _, seed, _ in sources] + [request.seed for request in requests]
    generators = row_generators(seeds)
    sigmas = model.schedule.sigmas(config.steps, spacing=config.spacing).to(model.device)
    size = model.latent_size(config.resolution, config.resolution)
    noise = row_noise(generators, (model.latent_channels, *size)).to(model.device)
    return Candidates(
        requests=tuple(requests),
        source=tuple(sources.index(look) for look in looks),
        rows=Progress.begin(noise * sigmas[0]),
        generators=tuple(generators),
        step=0,
    )


@torch.inference_mode()
def proceed(
    model: StableDiffusion,
    candidates: Candidates,
    config: PairConfig,
    *,
    stop: int | None = None,
    controls: Sequence[PairControl] | None = None,
    blend_downscale: int = 4,
) -> Candidates:
    """The candidates after step `stop`, by default all; one UNet batch of two passes a row.

    All rows of a request have its guidance scale; the edited row takes the source's
    self-attention, in all layers and with and without text, while
    `self_replace > step / (steps - 1)`. LocalBlend, where `controls` has any, reads the layers
    that are `blend_downscale` times smaller than the latents.
    Source: InstructPix2Pix section 3.1.2 and METHOD section 2.

    Raises: ConfigError for LocalBlend in a run in parts: its maps are sums over all steps.
    """
    requests, source = candidates.requests, candidates.source
    sigmas = model.schedule.sigmas(config.steps, spacing=config.spacing).to(model.device)
    # of each row, the request that says what it is
    shown = [*(source.index(row) for row in range(candidates.sources)), *range(len(requests))]
    scale = torch.tensor([requests[r].guidance_scale for r in shown], device=model.device)
    text = _guidance_text(model, requests, shown)
    pairs = pair_controls(model, requests, config) if controls is None else controls
    size = (candidates.rows.x.shape[2], candidates.rows.x.shape[3])
    maps = word_maps(pairs, size, downscale=blend_downscale, device=model.device, source=source)
    last = config.steps if stop is None else stop
    if maps is not None and (candidates.step, last) != (0, config.steps):
        raise ConfigError("LocalBlend needs all steps in one run")
    at_step = (
        attention_control(
            pairs, step=step, steps=config.steps, device=model.device, maps=maps, source=source
        )
        for step in range(candidates.step, last)
    )

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        twice = torch.cat([sigma, sigma])
        both = model.denoise(torch.cat([x, x]), twice, text, control=next(at_step))
        return one_scale(both[: x.shape[0]], both[x.shape[0] :], scale)

    def blended(step: int, x: Tensor) -> Tensor:
        return x if maps is None else maps.blend(x, step, config.steps)

    with controlled_attention(model.unet):
        rows = advance(
            guided,
            candidates.rows,
            sigmas,
            start=candidates.step,
            stop=last,
            sampler=config.sampler,
            generators=candidates.generators,
            after_step=blended,
        )
    return replace(candidates, rows=rows, step=last)


@torch.inference_mode()
def decode_pairs(
    model: StableDiffusion,
    candidates: Candidates,
    latents: Tensor,
    *,
    decode_batch: int | None = None,
) -> tuple[Pictures, Pictures]:
    """Source and edited pictures, each uint8 (request, height, width, 3), of row-wise latents.

    `latents` are `candidates.rows.x` after the last step; before it `candidates.rows.denoised`,
    which is what the model then takes for the finished ones. `decode_batch` of them, by default
    all, are decoded at a time.
    """
    parts = torch.split(latents, decode_batch or len(latents))
    pictures = np.concatenate([to_uint8(model.decode(part)) for part in parts])
    return pictures[list(candidates.source)], pictures[candidates.sources :]


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
    replaces what `pair_controls` says of them. `decode_batch` pictures, by default all, are decoded
    at a time.
    """
    done = proceed(model, begin(model, requests, config), config, controls=controls)
    return decode_pairs(model, done, done.rows.x, decode_batch=decode_batch)


def candidate_latents(
    model: StableDiffusion,
    requests: Sequence[CandidateRequest],
    config: PairConfig,
    *,
    controls: Sequence[PairControl] | None = None,
    blend_downscale: int = 4,
) -> Tensor:
    """Scaled latents (2 x request, channel, height, width): all sources, then all edited."""
    begun = begin(model, requests, config)
    done = proceed(model, begun, config, controls=controls, blend_downscale=blend_downscale)
    sources, edited = done.split(done.rows.x)
    return torch.cat([sources[list(done.source)], edited])


def _guidance_text(
    model: StableDiffusion, requests: Sequence[CandidateRequest], shown: Sequence[int]
) -> Tensor:
    """Text rows of a guided batch: as many without text, captions, edited captions."""
    captions = [requests[place].caption for place in shown[: -len(requests)]]
    wanted = [""] * len(shown) + captions + [request.edited_caption for request in requests]
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
