"""The editor's UNet: a text-to-image UNet with room for the source image at its input."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ip2p_ray.errors import ModelError

Unet = TypeVar("Unet", bound=nn.Module)


def widen(unet: Unet) -> Unet:
    """The same UNet, changed in place to take the source latent's channels beside the noisy ones.

    A UNet of C output channels goes from C to 2C input channels (SD: 4 to 8): the first C input
    channels keep their weights, the C new ones are zero, and the bias stays, so that at step 0
    the output equals the narrow one's whatever the source latent holds. A UNet that has 2C input
    channels already is returned unchanged, so an editor can be trained further.

    Raises:
        ModelError: the UNet takes neither C nor 2C channels.
    Source: METHOD section 4; the public diffusers script forgets the bias (METHOD T12).
    """
    narrow, latent_channels = unet.conv_in, _latent_channels(unet)
    if not isinstance(narrow, nn.Conv2d):
        raise ModelError(f"the UNet's conv_in is a {type(narrow).__name__}, not a Conv2d")
    if narrow.in_channels == 2 * latent_channels:
        return unet
    if narrow.in_channels != latent_channels:
        raise ModelError(
            f"the UNet takes {narrow.in_channels} channels and returns {latent_channels}; an "
            f"editor starts from one that takes {latent_channels} or {2 * latent_channels}"
        )
    unet.conv_in = _wider(narrow, 2 * latent_channels)
    unet.register_to_config(in_channels=2 * latent_channels)  # type: ignore[operator]
    return unet


def _latent_channels(unet: nn.Module) -> int:
    return int(unet.config.out_channels)  # type: ignore[union-attr, arg-type]


def _wider(narrow: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    weight = narrow.weight.detach()
    wide: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d,
        in_channels,
        narrow.out_channels,
        kernel_size=tuple(weight.shape[-2:]),
        stride=narrow.stride,
        padding=narrow.padding,
        bias=narrow.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : narrow.in_channels] = weight
        if narrow.bias is not None and wide.bias is not None:
            wide.bias.copy_(narrow.bias)
    wide.train(narrow.training)
    return wide.requires_grad_(narrow.weight.requires_grad)
