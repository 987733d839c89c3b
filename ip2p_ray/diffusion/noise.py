"""The noise schedule of a diffusion model, and the random streams of its samplers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ip2p_ray.errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction"]
Spacing = Literal["linspace", "trailing"]

# A schedule with zero terminal SNR has an infinite last sigma; this is the smallest
# alphas_cumprod that half precision can still tell from zero.
SMALLEST_ALPHA = 2.0**-24


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """What each timestep of a model means: how much signal is left, and what is predicted."""

    alphas_cumprod: Tensor
    """float64 (timestep,) on the CPU, falling, in (0, 1)."""
    prediction_type: PredictionType = "epsilon"
    """What the UNet returns."""
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"prediction_type must be 'epsilon' or 'v_prediction', got {self.prediction_type!r}"
            )

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that a diffusers scheduler config describes.

        Keys read: num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
        prediction_type, rescale_betas_zero_snr; a missing key has diffusers' default.

        Raises: ConfigError for an unknown beta_schedule or prediction_type, and for epsilon
        prediction with zero terminal SNR (pure noise says nothing about the picture).
        """
        prediction_type = config.get("prediction_type", "epsilon")
        zero_snr = bool(config.get("rescale_betas_zero_snr", False))
        if zero_snr and prediction_type != "v_prediction":
            raise ConfigError(
                "rescale_betas_zero_snr needs prediction_type 'v_prediction', "
                f"got {prediction_type!r}"
            )
        alphas_cumprod = torch.cumprod(1.0 - _betas(config), dim=0)
        if zero_snr:
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        return NoiseSchedule(alphas_cumprod, cast(PredictionType, prediction_type))

    @property
    def train_timesteps(self) -> int:
        """How many timesteps the model was trained on, 1,000 for Stable Diffusion."""
        return self.alphas_cumprod.shape[0]

    def sigmas(self, steps: int, *, spacing: Spacing = "linspace") -> Tensor:
        """The noise levels of a run: float32 (steps + 1,), falling, the last one zero.

        "linspace" is the reference's: timesteps 999 * (1 - i / (steps - 1)), both ends
        included. "trailing" takes 1000 * (1 - i / steps) - 1, rounded: it begins at the last
        timestep too, but spends no step on the nearly clean end.
        Source: METHOD section 2 (uniform in time; the paper's "Karras" is not in its code).
        """
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, got {steps}")
        last = self.train_timesteps - 1
        if spacing == "linspace":
            timesteps = torch.linspace(last, 0, steps, dtype=torch.float64)
        elif spacing == "trailing":
            index = torch.arange(steps, dtype=torch.float64)
            timesteps = ((last + 1) * (1 - index / steps)).round() - 1
        else:
            raise ConfigError(f"spacing must be 'linspace' or 'trailing', got {spacing!r}")
        return torch.cat([self.sigma(timesteps).float(), torch.zeros(1)])

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level at each timestep, float64; log-linear between integer timesteps."""
        table = self._log_sigmas(timestep.device)
        position = timestep.double().clamp(0, self.train_timesteps - 1)
        low = position.floor().long().clamp(max=max(self.train_timesteps - 2, 0))
        high = (low + 1).clamp(max=self.train_timesteps - 1)
        return torch.lerp(table[low], table[high], position - low).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) timestep of each noise level, float32; the inverse of `sigma`.

        Levels outside the schedule give its ends.
        """
        table = self._log_sigmas(sigma.device)
        log_sigma = sigma.double().log()
        high = torch.searchsorted(table, log_sigma).clamp(1, self.train_timesteps - 1)
        low = high - 1
        share = (log_sigma - table[low]) / (table[high] - table[low])
        return (low + share.clamp(0, 1)).float()

    def _log_sigmas(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            alpha = self.alphas_cumprod.double()
            self._tables[device] = (0.5 * ((1 - alpha) / alpha).log()).to(device)
        return self._tables[device]


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a row, so that a row's noise depends on its own seed only."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def row_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, float32 (row, *shape) on the CPU; advances each generator once."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def _betas(config: Mapping[str, Any]) -> Tensor:
    """float64 (timestep,): how much noise each training timestep adds."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    count = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    name = config.get("beta_schedule", "linear")
    if name == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if name == "squaredcos_cap_v2":
        time = torch.arange(count + 1, dtype=torch.float64) / count
        alpha = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha[1:] / alpha[:-1]).clamp(max=0.999)
    raise ConfigError(
        f"beta_schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2', got {name!r}"
    )


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The same schedule stretched so that its last timestep is pure noise.

    Source: arXiv 2305.08891, algorithm 1; the last value is kept just above zero.
    """
    root = alphas_cumprod.sqrt()
    stretched = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return stretched.square().clamp(min=SMALLEST_ALPHA)
