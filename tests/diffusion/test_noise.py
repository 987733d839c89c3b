from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

from ip2p_ray.diffusion.noise import NoiseSchedule, Spacing, row_generators, row_noise
from ip2p_ray.errors import ConfigError
from ip2p_ray.testing import tiny_scheduler_config

# diffusers' schedulers turn tensors into arrays in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Scheduler: Any = EulerAncestralDiscreteScheduler
SD15 = tiny_scheduler_config()
ZERO_SNR = {**SD15, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def test_reference_sigmas_of_stable_diffusion() -> None:
    sigmas = NoiseSchedule.from_config(SD15).sigmas(100)
    assert sigmas.shape == (101,)
    assert sigmas.dtype == torch.float32
    assert sigmas[0].item() == pytest.approx(14.6146, abs=1e-4)
    assert sigmas[75].item() == pytest.approx(0.676, abs=1e-3)
    assert sigmas[99].item() == pytest.approx(0.02917, abs=1e-5)
    assert sigmas[100].item() == 0.0


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 100])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("config", [SD15, ZERO_SNR], ids=["sd15", "zero_snr"])
def test_sigmas_agree_with_diffusers(
    steps: int, spacing: Spacing, config: dict[str, object]
) -> None:
    scheduler = Scheduler.from_config(config, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_config(config)
    ours = schedule.sigmas(steps, spacing=spacing)
    theirs = scheduler.sigmas
    if steps == 1 and spacing == "linspace":
        # numpy's linspace of one element is its first, timestep 0; a run begins at the noise.
        assert ours[0] == pytest.approx(14.6146, abs=1e-4) or config is ZERO_SNR
        return
    # linear against log-linear interpolation between timesteps: 9e-5, and 4e-4 near the steep end
    # of a zero-SNR schedule; in its last interval the two differ freely, so that is left out
    inside = scheduler.timesteps <= 998 if config is ZERO_SNR else scheduler.timesteps <= 999
    rtol = 5e-4 if config is ZERO_SNR else 2e-4
    torch.testing.assert_close(ours[:-1][inside], theirs[:-1][inside], rtol=rtol, atol=0)
    assert ours[-1] == theirs[-1] == 0
    times = schedule.timestep(ours[:-1])[inside]
    torch.testing.assert_close(times, scheduler.timesteps[inside].float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alphas_agree_with_diffusers(name: str) -> None:
    config = {"beta_schedule": name, "num_train_timesteps": 200}
    theirs = Scheduler.from_config(config).alphas_cumprod
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-9)


def test_trained_betas_are_read() -> None:
    schedule = NoiseSchedule.from_config({"trained_betas": [0.1, 0.2]})
    torch.testing.assert_close(schedule.alphas_cumprod.float(), torch.tensor([0.9, 0.72]))


def test_zero_terminal_snr_ends_in_pure_noise_and_is_finite() -> None:
    sigmas = NoiseSchedule.from_config(ZERO_SNR).sigmas(10)
    assert sigmas[0] == pytest.approx(math.sqrt(2**24 - 1), rel=1e-6)
    assert torch.isfinite(sigmas).all()
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("config", [SD15, ZERO_SNR], ids=["sd15", "zero_snr"])
def test_timestep_inverts_sigma(config: dict[str, object]) -> None:
    schedule = NoiseSchedule.from_config(config)
    timesteps = torch.linspace(0, 999, 777, dtype=torch.float64)
    back = schedule.timestep(schedule.sigma(timesteps))
    torch.testing.assert_close(back, timesteps.float(), rtol=0, atol=1e-4)


def test_sigma_is_log_linear_between_timesteps() -> None:
    schedule = NoiseSchedule.from_config(SD15)
    low, middle, high = schedule.sigma(torch.tensor([10.0, 10.5, 11.0]))
    assert middle.item() == pytest.approx(math.sqrt(low * high), rel=1e-12)


def test_levels_outside_the_schedule_give_its_ends() -> None:
    schedule = NoiseSchedule.from_config(SD15)
    assert schedule.timestep(torch.tensor([0.0, 1e-9, 1e9])).tolist() == [0, 0, 999]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"rescale_betas_zero_snr": True}, "needs prediction_type 'v_prediction'"),
        ({"prediction_type": "sample"}, "got 'sample'"),
        ({"beta_schedule": "cubic"}, "got 'cubic'"),
    ],
)
def test_unsupported_configs_are_refused(config: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize(("steps", "spacing"), [(0, "linspace"), (5, "leading")])
def test_unsupported_runs_are_refused(steps: int, spacing: str) -> None:
    with pytest.raises(ConfigError):
        NoiseSchedule.from_config(SD15).sigmas(steps, spacing=spacing)  # type: ignore[arg-type]


def test_a_rows_noise_depends_on_its_seed_only() -> None:
    alone = row_noise(row_generators([7]), (4, 3, 5))
    among = row_noise(row_generators([1, 7, 2**62]), (4, 3, 5))
    assert torch.equal(among[1], alone[0])
    assert not torch.equal(among[0], among[1])
    assert torch.equal(alone[0], torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(7)))


def test_generators_advance() -> None:
    generators = row_generators([3, 3])
    first, second = row_noise(generators, (2, 8)), row_noise(generators, (2, 8))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
