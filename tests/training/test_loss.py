import math
from typing import Any

import pytest
import torch

from ip2p_ray.diffusion.noise import NoiseSchedule, PredictionType
from ip2p_ray.training.loss import (
    add_noise,
    edited_latents,
    editing_loss,
    prediction_target,
    snr_weights,
)


def schedule(*abar: float, prediction_type: PredictionType = "epsilon") -> NoiseSchedule:
    return NoiseSchedule(torch.tensor(abar, dtype=torch.float64), prediction_type)


def full(value: float) -> torch.Tensor:
    return torch.full((1, 1, 2, 2), value)


def test_edited_latents_are_a_scaled_posterior_sample() -> None:
    assert torch.allclose(edited_latents(full(2.0), full(0.5), full(-3.0), 0.1), full(0.05))


def test_noise_by_hand() -> None:
    levels = schedule(0.64, 0.36)
    noisy = add_noise(levels, full(1.0), full(2.0), torch.tensor([0]))
    assert torch.allclose(noisy, full(0.8 + 2 * 0.6))


def test_targets_by_hand() -> None:
    where = torch.tensor([0])
    assert torch.equal(prediction_target(schedule(0.64), full(1.0), full(2.0), where), full(2.0))
    v = prediction_target(
        schedule(0.64, prediction_type="v_prediction"), full(1.0), full(2.0), where
    )
    assert torch.allclose(v, full(0.8 * 2 - 0.6 * 1))


def test_v_and_eps_describe_the_same_picture() -> None:
    """sqrt(abar) x_t - sqrt(1 - abar) v is the clean latent."""
    levels = schedule(0.64, prediction_type="v_prediction")
    where, latents, noise = torch.tensor([0]), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    noisy = add_noise(levels, latents, noise, where)
    v = prediction_target(levels, latents, noise, where)
    assert torch.allclose(0.8 * noisy - 0.6 * v, latents, atol=1e-6)


def test_weights_off_by_default() -> None:
    assert snr_weights(schedule(0.5, 0.1), torch.tensor([0, 1]), None).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("snr", "eps", "v"), [(20.0, 0.25, 5 / 21), (1.0, 1.0, 0.5)])
def test_min_snr_weights(snr: float, eps: float, v: float) -> None:
    abar, where = snr / (1 + snr), torch.tensor([0])
    assert snr_weights(schedule(abar), where, 5.0).item() == pytest.approx(eps)
    levels = schedule(abar, prediction_type="v_prediction")
    assert snr_weights(levels, where, 5.0).item() == pytest.approx(v)


def test_min_snr_weights_at_pure_noise() -> None:
    where = torch.tensor([0])
    assert snr_weights(schedule(0.0), where, 5.0).item() == 1.0
    levels = schedule(0.0, prediction_type="v_prediction")
    assert snr_weights(levels, where, 5.0).item() == 0.0


class Recorder:
    """A UNet that returns a constant and remembers what it was given."""

    def __call__(self, inputs: torch.Tensor, timesteps: torch.Tensor, **given: Any) -> Any:
        self.inputs, self.timesteps, self.given = inputs, timesteps, given
        return (torch.full_like(inputs[:, :1], 3.0),)


def test_loss_by_hand() -> None:
    unet, text = Recorder(), torch.randn(2, 5, 7)
    losses = editing_loss(
        unet,
        schedule(0.64, 0.36),
        latents=full(1.0).expand(2, 1, 2, 2),
        image_latents=full(9.0).expand(2, 1, 2, 2),
        text=text,
        noise=torch.tensor([2.0, 5.0])[:, None, None, None].expand(2, 1, 2, 2),
        timesteps=torch.tensor([0, 1]),
    )
    assert losses.tolist() == [1.0, 4.0]
    assert torch.allclose(unet.inputs[0, 0], torch.tensor(0.8 + 0.6 * 2))
    assert torch.allclose(unet.inputs[1, 0], torch.tensor(0.6 + 0.8 * 5))
    assert (unet.inputs[:, 1] == 9.0).all()
    assert unet.timesteps.tolist() == [0, 1]
    assert unet.given["encoder_hidden_states"] is text


def test_loss_is_weighted() -> None:
    abar = 20 / 21
    losses = editing_loss(
        Recorder(),
        schedule(abar),
        latents=full(0.0),
        image_latents=full(0.0),
        text=torch.zeros(1, 1, 1),
        noise=full(1.0),
        timesteps=torch.tensor([0]),
        min_snr_gamma=5.0,
    )
    assert losses.item() == pytest.approx(4.0 * 0.25)
    assert math.isfinite(losses.item())
