"""Samplers: from noise to a picture in steps.

A step is a function of tensors alone and every row has its own noise levels, so one batch may
hold rows at different steps; a row's result never depends on its neighbours.

x, denoised and noise are (row, channel, height, width); sigma and sigma_next are (row,), the
noise levels before and after the step. A row with sigma_next 0 becomes its denoised image; a
row with sigma 0 has arrived and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ip2p_ray.diffusion.guidance import one_scale, per_row
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.noise import Spacing, row_generators, row_noise
from ip2p_ray.errors import ConfigError
from ip2p_ray.images import to_uint8

Sampler = Literal["euler", "euler_ancestral", "dpmpp_2m"]
Denoise = Callable[[Tensor, Tensor], Tensor]


def euler_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Return x moved along the line to its denoised image.

    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without churn.
    """
    return denoised + per_row(_ratio(sigma_next, sigma), x) * (x - denoised)


def euler_ancestral_step(
    x: Tensor,
    denoised: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    noise: Tensor,
    *,
    eta: float = 1.0,
) -> Tensor:
    """Return x moved below sigma_next and lifted to it with standard normal `noise`, like x.

    `eta` is the share of fresh noise: 1 is ancestral sampling, 0 the plain Euler step.
    Source: k-diffusion's sample_euler_ancestral, used by the InstructPix2Pix code.
    """
    variance = sigma_next**2 * (1 - _ratio(sigma_next, sigma) ** 2)
    up = torch.minimum(sigma_next, eta * variance.clamp(min=0).sqrt())
    down = (sigma_next**2 - up**2).clamp(min=0).sqrt()
    return euler_step(x, denoised, sigma, down) + per_row(up, x) * noise.to(x)


def dpmpp_2m_step(
    x: Tensor,
    denoised: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    previous_denoised: Tensor,
    sigma_previous: Tensor,
) -> Tensor:
    """Return x after a second-order step that reuses the denoised image of the step before.

    `sigma_previous` (row,) is infinite where a row has no step before; such a row, and one
    with sigma_next 0, takes the first-order step.
    Source: DPM-Solver++ (arXiv 2211.01095), algorithm 2.
    """
    size = (sigma / sigma_next).log()
    size_before = (sigma_previous / sigma).log()
    second_order = torch.isfinite(size) & torch.isfinite(size_before) & (size_before > 0)
    weight = torch.where(second_order, size / (2 * size_before), torch.zeros_like(sigma))
    extrapolated = denoised + per_row(weight, x) * (denoised - previous_denoised)
    return euler_step(x, extrapolated, sigma, sigma_next)


@dataclass(frozen=True, eq=False)
class Progress:
    """Rows between two steps: with each row's generator, all that its next step depends on."""

    x: Tensor
    """Latents, (row, channel, height, width)."""
    denoised: Tensor
    """What the step before took for the clean latents, of x's shape; x before the first step."""
    sigma: Tensor
    """(row,): the noise level of the step before; infinite before the first step."""

    @staticmethod
    def begin(x: Tensor) -> Progress:
        """Rows before their first step; x is noise at the first level."""
        return Progress(x, x, torch.full((x.shape[0],), float("inf"), device=x.device))

    def take(self, rows: Sequence[int]) -> Progress:
        """These rows, in this order."""
        return Progress(*(tensor[list(rows)] for tensor in vars(self).values()))

    @staticmethod
    def join(parts: Sequence[Progress]) -> Progress:
        """All rows of the parts, one part after the other."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Progress(*(torch.cat(column) for column in columns))


def advance(
    denoise: Denoise,
    rows: Progress,
    sigmas: Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    sampler: Sampler = "euler_ancestral",
    generators: Sequence[torch.Generator] | None = None,
    after_step: Callable[[int, Tensor], Tensor] | None = None,
) -> Progress:
    """The rows after the steps from `start` up to but without `stop`, by default all.

    Arguments are those of `sample`; `sigmas` holds every level of the run. A run in parts gives
    the same bits as a whole one, however the rows are grouped in between as far as `denoise` does.
    """
    check_sampler(sampler)
    levels = sigmas.to(rows.x.device, torch.float32).expand(rows.x.shape[0], -1)
    steps = levels.shape[1] - 1
    for step in range(start, steps if stop is None else stop):
        sigma, sigma_next = levels[:, step], levels[:, step + 1]
        denoised = denoise(rows.x, sigma)
        noise = None
        if sampler == "euler_ancestral" and step < steps - 1:
            if generators is None:
                raise ConfigError("euler_ancestral needs a generator for every row, got none")
            noise = row_noise(generators, rows.x.shape[1:])
        rows = move(rows, denoised, sigma, sigma_next, sampler=sampler, noise=noise)
        rows = rows if after_step is None else replace(rows, x=after_step(step, rows.x))
    return rows


def move(
    rows: Progress,
    denoised: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    sampler: Sampler,
    noise: Tensor | None = None,
) -> Progress:
    """The rows after one step, each from its own noise level to its own next one.

    Only "euler_ancestral" reads `noise`, and without it takes the step that adds none: right where
    every sigma_next is 0. What it adds to a row whose sigma_next is 0 is nothing.
    """
    if sampler == "euler_ancestral" and noise is not None:
        x = euler_ancestral_step(rows.x, denoised, sigma, sigma_next, noise.to(rows.x.device))
    elif sampler == "dpmpp_2m":
        x = dpmpp_2m_step(rows.x, denoised, sigma, sigma_next, rows.denoised, rows.sigma)
    else:
        x = euler_step(rows.x, denoised, sigma, sigma_next)
    return Progress(x, denoised, sigma)


def sample(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    sampler: Sampler = "euler_ancestral",
    generators: Sequence[torch.Generator] | None = None,
    after_step: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """The latents that x ends in, (row, channel, height, width).

    `denoise(x, sigma)` returns the denoised x, sigma being (row,). `sigmas` is (steps + 1,) or,
    for rows with levels of their own, (row, steps + 1); x is noise at the first level.
    "euler_ancestral" draws one noise a step from each row's generator, the last step excepted,
    which adds none. `after_step(step, x)` may return a changed x.
    """
    rows = Progress.begin(x)
    return advance(
        denoise, rows, sigmas, sampler=sampler, generators=generators, after_step=after_step
    ).x


@torch.inference_mode()
def text_to_image(
    model: StableDiffusion,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    height: int,
    width: int,
    steps: int = 100,
    guidance_scale: float | Sequence[float] = 7.5,
    sampler: Sampler = "euler_ancestral",
    spacing: Spacing = "linspace",
) -> npt.NDArray[np.uint8]:
    """One picture a caption, uint8 (row, height, width, 3).

    Each row's noise comes from its own seed: the first draw is the initial noise, then one a
    step, as diffusers draws with a list of CPU generators. `guidance_scale` is one number or
    one a row.
    """
    if len(captions) != len(seeds):
        raise ConfigError(f"{len(captions)} captions but {len(seeds)} seeds: one seed a caption")
    rows = len(captions)
    generators = row_generators(seeds)
    sigmas = model.schedule.sigmas(steps, spacing=spacing).to(model.device)
    shape = (model.latent_channels, *model.latent_size(height, width))
    x = row_noise(generators, shape).to(model.device) * sigmas[0]
    text = model.encode_text(["", *captions])
    text = torch.cat([text[:1].expand(rows, -1, -1), text[1:]])
    scale = torch.as_tensor(guidance_scale, device=x.device, dtype=x.dtype).expand(rows)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        both = model.denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), text)
        return one_scale(both[:rows], both[rows:], scale)

    x = sample(guided, x, sigmas, sampler=sampler, generators=generators)
    return to_uint8(model.decode(x))


def check_sampler(sampler: str) -> None:
    """Raises: ConfigError unless `sampler` names one of the samplers here."""
    if sampler not in get_args(Sampler):
        raise ConfigError(f"sampler must be one of {get_args(Sampler)}, got {sampler!r}")


def _ratio(sigma_next: Tensor, sigma: Tensor) -> Tensor:
    """sigma_next / sigma, and 1 where both are zero: such a row stays."""
    return torch.where(sigma > 0, sigma_next / sigma, torch.ones_like(sigma))
