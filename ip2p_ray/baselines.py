"""What a generator without any training makes of a picture: edits to compare an editor with.

Pictures are RGB and of one size a batch; captions, seeds and settings are one a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from ip2p_ray.candidates import CandidateRequest
from ip2p_ray.diffusion.guidance import one_scale
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.noise import Spacing, row_generators, row_noise
from ip2p_ray.diffusion.sample import Progress, Sampler, advance, euler_step
from ip2p_ray.errors import ConfigError
from ip2p_ray.images import UINT8, to_tensor, to_uint8
from ip2p_ray.pairs import PairConfig, begin, proceed


@torch.inference_mode()
def sdedit(
    model: StableDiffusion,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    strength: float,
    steps: int,
    guidance_scale: float,
    sampler: Sampler = "euler_ancestral",
    spacing: Spacing = "linspace",
) -> UINT8:
    """The pictures, noised and drawn again as the captions say: uint8 (row, height, width, 3).

    `strength`, in (0, 1], is the share of the steps that are taken: 1 forgets the picture.
    `captions` describe the edited pictures.

    Source: SDEdit (arXiv 2108.01073) in the latent space, the first baseline of the paper.
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength lies in (0, 1], got {strength}")
    generators = row_generators(seeds)
    sigmas = model.schedule.sigmas(steps, spacing=spacing).to(model.device)
    first = steps - max(1, round(strength * steps))
    clean = _latents(model, pictures)
    noise = row_noise(generators, clean.shape[1:]).to(clean)
    text = model.encode_text(["", *captions])
    rows = len(pictures)
    both = torch.cat([text[:1].expand(rows, -1, -1), text[1:]])
    scale = torch.full((rows,), guidance_scale)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        twice = model.denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        return one_scale(twice[:rows], twice[rows:], scale)

    done = advance(
        guided,
        Progress.begin(clean + sigmas[first] * noise),
        sigmas,
        start=first,
        sampler=sampler,
        generators=generators,
    )
    return to_uint8(model.decode(done.x))


@torch.inference_mode()
def prompt_to_prompt(
    model: StableDiffusion,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    edited_captions: Sequence[str],
    *,
    self_replace: float,
    steps: int,
    guidance_scale: float,
    spacing: Spacing = "linspace",
) -> UINT8:
    """The pictures, inverted and edited by Prompt-to-Prompt: uint8 (row, height, width, 3).

    The noise that draws a picture under its caption is found by walking the steps backwards; from
    it both captions are drawn, the edited one with the source's self-attention for the fraction
    `self_replace`, in [0, 1], of the steps. Nothing is random.

    Source: Prompt-to-Prompt (arXiv 2208.01626) section 5 with DDIM inversion, a baseline of the
    paper. Inversion is exact only without guidance, so a picture is not quite drawn again; what
    mends that (null-text inversion) is NOT done. Attention is replaced as in pair generation.
    """
    latents = inverted(model, pictures, captions, steps=steps, spacing=spacing)
    height, width = pictures[0].height, pictures[0].width
    config = PairConfig(
        resolution=min(height, width), steps=steps, sampler="euler", spacing=spacing, candidates=1
    )
    requests = [
        CandidateRequest(
            triplet_key="",
            index=row,
            caption=caption,
            edited_caption=edited_caption,
            seed=row,  # no two rows share a source, and no noise is drawn
            self_replace=self_replace,
            guidance_scale=guidance_scale,
        )
        for row, (caption, edited_caption) in enumerate(zip(captions, edited_captions, strict=True))
    ]
    begun = begin(model, requests, config)
    begun = replace(begun, rows=Progress.begin(torch.cat([latents, latents])))
    done = proceed(model, begun, config)
    return to_uint8(model.decode(done.split(done.rows.x)[1]))


@torch.inference_mode()
def inverted(
    model: StableDiffusion,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    steps: int,
    spacing: Spacing = "linspace",
) -> Tensor:
    """Latents at the first noise level from which Euler steps draw the pictures, without guidance.

    (row, channel, height, width), about as exact as the steps are small.
    """
    levels = model.schedule.sigmas(steps, spacing=spacing)[:-1].flip(0).to(model.device)
    x = _latents(model, pictures)
    text = model.encode_text(list(captions))
    # from no noise to the lowest level there is a step too, taken with what is seen at that level
    x = 2 * x - model.denoise(x, levels[0].expand(x.shape[0]), text)
    for level, following in itertools.pairwise(levels):
        sigma = level.expand(x.shape[0])
        denoised = model.denoise(x, sigma, text)
        x = euler_step(x, denoised, sigma, following.expand(x.shape[0]))
    return x


def _latents(model: StableDiffusion, pictures: Sequence[Image.Image]) -> Tensor:
    """Scaled latents of the pictures: the mode of what the autoencoder says."""
    mean, _ = model.encode_image(torch.stack([to_tensor(picture) for picture in pictures]))
    return mean * model.scaling_factor
