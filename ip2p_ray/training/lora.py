"""Low-rank additions to the attention's projections, in place of training every weight (peft)."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ip2p_ray.errors import ConfigError

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers of every attention that get an addition."""


def add_lora(unet: nn.Module, rank: int, *, seed: int) -> None:
    """Only additions of that rank to PROJECTIONS, and conv_in, are trained from here on.

    conv_in is trained whole: its channels for the source image are new. The additions begin as
    zero; what is random in them depends on `seed` only.

    Raises:
        ConfigError: peft is not installed.
    """
    require_peft()
    from peft import LoraConfig

    unet.requires_grad_(False)
    adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(adapter)  # type: ignore[operator]
    unet.conv_in.requires_grad_(True)


def merged(unet: nn.Module) -> nn.Module:
    """A copy of the UNet with its additions in its weights, an ordinary one again."""
    whole: Any = copy.deepcopy(unet)
    whole.fuse_lora()
    whole.unload_lora()
    module: nn.Module = whole
    return module


def require_peft() -> None:
    """Returns if peft is installed.

    Raises:
        ConfigError: it is not; says what to install.
    """
    if find_spec("peft") is None:
        raise ConfigError('lora_rank needs peft: pip install "ip2p_ray[lora]"')
