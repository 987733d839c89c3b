import copy

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from ip2p_ray.errors import ModelError
from ip2p_ray.testing import tiny_stable_diffusion
from ip2p_ray.training.unet import widen


@torch.inference_mode()
def difference(narrow: UNet2DConditionModel, side: int, text: torch.Size) -> float:
    """The largest difference between the widened UNet with any image and the narrow one."""
    channels = narrow.config["out_channels"]
    wide = widen(copy.deepcopy(narrow))
    torch.manual_seed(0)
    x, image = torch.randn(2, 2, channels, side, side)
    words, timesteps = torch.randn(2, *text), torch.tensor([10, 900])
    expected = narrow(x, timesteps, encoder_hidden_states=words).sample
    worst = 0.0
    for condition in (torch.zeros_like(image), image, 100 * image):
        inputs = torch.cat([x, condition], dim=1)
        got = wide(inputs, timesteps, encoder_hidden_states=words).sample
        worst = max(worst, (got - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("channels", [4, 8])
def test_widened_equals_narrow_at_step_0(channels: int) -> None:
    model = tiny_stable_diffusion(latent_channels=channels)
    assert difference(model.unet, 8, torch.Size((16, 24))) <= 1e-6


def test_weights_and_config() -> None:
    narrow = tiny_stable_diffusion().unet
    wide = widen(copy.deepcopy(narrow))
    assert wide.config["in_channels"] == 8
    assert torch.equal(wide.conv_in.weight[:, :4], narrow.conv_in.weight)
    assert not wide.conv_in.weight[:, 4:].any()
    before, after = narrow.state_dict(), wide.state_dict()
    others = before.keys() - {"conv_in.weight"}
    assert "conv_in.bias" in others
    assert all(torch.equal(after[name], before[name]) for name in others)


def test_keeps_dtype_mode_and_gradient_flag() -> None:
    narrow = nn.Module.to(tiny_stable_diffusion().unet, torch.bfloat16)
    wide = widen(narrow.requires_grad_(False).eval())
    assert wide.conv_in.weight.dtype == torch.bfloat16
    assert not wide.conv_in.training
    assert not any(parameter.requires_grad for parameter in wide.parameters())


def test_wide_is_returned_unchanged() -> None:
    unet = tiny_stable_diffusion(in_channels=8).unet
    before = unet.conv_in.weight.clone()
    assert widen(unet) is unet
    assert torch.equal(unet.conv_in.weight, before)


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(ModelError, match="takes 9 channels and returns 4"):
        widen(tiny_stable_diffusion(in_channels=9).unet)


@pytest.mark.slow
def test_stable_diffusion_1_5_shape() -> None:
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert difference(unet.eval(), 8, torch.Size((77, 768))) <= 1e-6
