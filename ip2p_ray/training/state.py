"""Everything a run must remember to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.training.ema import Ema

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(kw_only=True)
class TrainState:
    """The UNet being trained with its optimizer and average; `train` advances it in place.

    Between two metrics of `train` it is consistent and may be saved (checkpoint.py).
    """

    unet: nn.Module
    """Float32 masters, twice the latent channels at its input."""
    optimizer: torch.optim.AdamW
    ema: Ema
    step: int = 0
    """Optimizer steps done."""
    run: dict[str, Any]
    """What the feed was made from: seed, batch_size and, once training began, the dataset."""

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors to save, by file ("unet", "ema", "optimizer"), then by parameter name."""
        named = self._trained()
        moments = {
            f"{name}.{moment}": value
            for name, parameter in named.items()
            for moment, value in self.optimizer.state.get(parameter, {}).items()
        }
        unet = {name: parameter.detach() for name, parameter in named.items()}
        return {"unet": unet, "ema": dict(self.ema.shadow), "optimizer": moments}

    def facts(self) -> dict[str, Any]:
        """What is to be saved beside the tensors, as JSON."""
        return {"step": self.step, "ema_updates": self.ema.updates, "run": dict(self.run)}

    @torch.no_grad()
    def restore(
        self, tensors: Mapping[str, Mapping[str, torch.Tensor]], facts: Mapping[str, Any]
    ) -> None:
        """Take over a saved state; nothing changes unless all of it fits.

        Raises:
            ModelError: a tensor is missing, left over or of another shape.
            ConfigError: it was saved by a run with another seed, batch size or dataset.
        """
        self._check(tensors, facts)
        for name, parameter in self._trained().items():
            parameter.copy_(tensors["unet"][name])
            self._restore_moments(name, parameter, tensors["optimizer"])
        self.ema.restore(tensors["ema"], facts["ema_updates"])
        self.step = facts["step"]
        self.run = {**self.run, **facts["run"]}

    def _trained(self) -> dict[str, nn.Parameter]:
        """Parameters by name; frozen ones are those of the model that training started from."""
        return {name: one for name, one in self.unet.named_parameters() if one.requires_grad}

    def _restore_moments(
        self, name: str, parameter: nn.Parameter, saved: Mapping[str, torch.Tensor]
    ) -> None:
        if f"{name}.step" not in saved:
            self.optimizer.state.pop(parameter, None)
            return
        fused = bool(self.optimizer.defaults.get("fused"))
        moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS[1:]}
        for moment, value in moments.items():
            value.copy_(saved[f"{name}.{moment}"])
        step = saved[f"{name}.step"].to(parameter.device if fused else "cpu", torch.float32)
        self.optimizer.state[parameter] = {"step": step.clone(), **moments}

    def _check(
        self, tensors: Mapping[str, Mapping[str, torch.Tensor]], facts: Mapping[str, Any]
    ) -> None:
        shapes = {name: tuple(value.shape) for name, value in self._trained().items()}
        moments = {
            f"{name}.{moment}": () if moment == "step" else shape
            for name, shape in shapes.items()
            for moment in MOMENTS
        }
        _check_shapes("unet", tensors["unet"], shapes)
        _check_shapes("ema", tensors["ema"], shapes)
        _check_shapes("optimizer", tensors["optimizer"], moments if facts["step"] else {})
        check_same_run(facts["run"], self.run)


def check_same_run(began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError where the two, as far as both know, were made from different things."""
    for name in sorted(began.keys() & now.keys()):
        if began[name] != now[name]:
            raise ConfigError(
                f"a run goes on with the {name} it began with: {began[name]!r}, now {now[name]!r}"
            )


def _check_shapes(
    part: str, saved: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    found = {name: tuple(value.shape) for name, value in saved.items()}
    wrong = sorted(
        name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name)
    )
    if wrong:
        raise ModelError(
            f"the saved {part} is of another model: {len(wrong)} tensors differ, "
            f"first {wrong[0]} ({found.get(wrong[0])} saved, {shapes.get(wrong[0])} here)"
        )
