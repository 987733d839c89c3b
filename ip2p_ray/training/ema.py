"""A moving average of the weights: what is exported and served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


def ema_horizon(decay: float, updates: int | None = None) -> float:
    """The number of optimizer steps that an average of this decay remembers: 1 / (1 - decay).

    After so many `updates` it is no more than the ramp lets it be.
    """
    if updates is not None:
        decay = ramped_decay(decay, updates)
    return 1.0 / (1.0 - decay)


def ramped_decay(decay: float, update: int) -> float:
    """The decay of one update, counted from 1: min(decay, (1 + update) / (10 + update)).

    The ramp lets early averages follow the weights; a decay of 0.9999 is reached at update
    89,990. Source: the reference's LitEma.
    """
    return min(decay, (1 + update) / (10 + update))


class Ema:
    """The average of a module's trained parameters, in float32 on their device, by parameter name.

    It starts as a copy of the weights at hand, so build it after they are loaded. `update` is
    called once an optimizer step (the reference calls it once a micro-batch: with its four
    accumulated micro-batches a decay of 0.9999 there is 0.9996 here).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.shadow = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> float:
        """The decay used by this update, after averaging the module's weights in."""
        self.updates += 1
        decay = ramped_decay(self.decay, self.updates)
        weights = dict(module.named_parameters())
        shadows = list(self.shadow.values())
        current = [weights[name].detach().float() for name in self.shadow]
        torch._foreach_lerp_(shadows, current, 1.0 - decay)
        return decay

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Take over a saved average; the names must be this module's."""
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])
        self.updates = updates

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's weights with the average."""
        for name, parameter in module.named_parameters():
            if name in self.shadow:
                parameter.copy_(self.shadow[name])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """The module holds the average inside the block and its own weights after it.

        Float32 weights change places with the average, so that no memory is needed for a third
        copy; `shadow` holds them meanwhile.
        """
        self._exchange(module)
        try:
            yield
        finally:
            self._exchange(module)

    @torch.no_grad()
    def _exchange(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if name in self.shadow:
                own = parameter.detach().clone()
                parameter.copy_(self.shadow[name])
                self.shadow[name].copy_(own)
