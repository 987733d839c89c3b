"""The training loss: how far the UNet's prediction is from what it should have predicted."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ip2p_ray.diffusion.noise import NoiseSchedule


def edited_latents(
    mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor, scaling_factor: float
) -> torch.Tensor:
    """A sample of the edited image's posterior, scaled: (row, channel, height, width).

    The source image's latent is the opposite on both counts: its mode, unscaled (METHOD 4).
    """
    return (mean + std * noise) * scaling_factor


def add_noise(
    schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """sqrt(abar) latents + sqrt(1 - abar) noise: (row, channel, height, width).

    timesteps are integers (row,).
    """
    signal, spread = _coefficients(schedule, timesteps, latents)
    return signal * latents + spread * noise


def prediction_target(
    schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet should return: the noise, or v = sqrt(abar) noise - sqrt(1 - abar) latents."""
    if schedule.prediction_type == "epsilon":
        return noise
    signal, spread = _coefficients(schedule, timesteps, latents)
    return signal * noise - spread * latents


def snr_weights(
    schedule: NoiseSchedule, timesteps: torch.Tensor, gamma: float | None
) -> torch.Tensor:
    """The weight of each row's loss, float32 (row,): ones, or min-SNR-gamma's.

    With gamma, epsilon weighs min(gamma / SNR, 1) and v weighs min(SNR, gamma) / (SNR + 1). Both
    are written in abar, so that SNR 0 (zero terminal SNR) is exact and not NaN.

    Source: Min-SNR (arXiv 2303.09556); no evidence for it on InstructPix2Pix, off by default.
    """
    abar = schedule.alphas_cumprod[timesteps.cpu()].double()
    if gamma is None:
        weights = torch.ones_like(abar)
    elif schedule.prediction_type == "epsilon":
        weights = (gamma * (1 - abar) / abar).clamp(max=1.0)
    else:
        weights = torch.minimum(abar, gamma * (1 - abar))
    return weights.to(timesteps.device, torch.float32)


def editing_loss(
    unet: Callable[..., tuple[torch.Tensor, ...]],
    schedule: NoiseSchedule,
    *,
    latents: torch.Tensor,
    image_latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:
    """Each row's weighted mean squared error, float32 (row,).

    latents, image_latents and noise are (row, channel, height, width): the edited image's scaled
    latents, the source's unscaled mode (zeros where dropped). text is (row, token, channel),
    timesteps are integers (row,).

    Source: E || target - prediction([z_t ; E(c_I)], t, c_T) ||^2, equation 1 of the paper.
    """
    noisy = add_noise(schedule, latents, noise, timesteps)
    target = prediction_target(schedule, latents, noise, timesteps)
    inputs = torch.cat([noisy, image_latents], dim=1)
    prediction = unet(inputs, timesteps, encoder_hidden_states=text, return_dict=False)[0]
    errors = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    return errors * snr_weights(schedule, timesteps, min_snr_gamma)


def _coefficients(
    schedule: NoiseSchedule, timesteps: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    abar = schedule.alphas_cumprod[timesteps.cpu()].double()[:, None, None, None]
    return abar.sqrt().to(like), (1 - abar).sqrt().to(like)
