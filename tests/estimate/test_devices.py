from functools import partial
from pathlib import Path

import pytest

from ip2p_ray.benchmark.measure import count_flops
from ip2p_ray.errors import ConfigError
from ip2p_ray.estimate import devices


def test_a_device_of_twice_the_peak_takes_half_the_time():
    slow, fast = devices.reckon("a100", 0.3), devices.reckon("a100", 0.6)
    for name in ("candidate_step", "candidate", "judgement", "latent", "sample", "answer_step"):
        assert getattr(slow, name).seconds == pytest.approx(2 * getattr(fast, name).seconds)
        assert getattr(slow, name).source.startswith("reckoned: 30% of 312 TFLOP/s of a a100")
        assert getattr(slow, name).source.endswith("as given")


def test_the_measured_figures_come_out_for_the_device_that_they_were_measured_on():
    """LOG.md, 2026-11-27: seconds of each unit of work on an H200."""
    found = devices.reckon("h200")
    measured = {
        "candidate_step": 0.01172,
        "candidate": 0.02725,
        "judgement": 1 / 120.5,
        "latent": 1 / 126.8,
        "sample": 1 / 124.8,
        "answer_step": 0.1967 / 20,
    }
    for name, seconds in measured.items():
        assert getattr(found, name).seconds == pytest.approx(seconds, rel=0.02), name
        assert getattr(found, name).source.endswith("of a h200, as measured")
    other = devices.reckon("a100")
    for name in measured:
        ratio = getattr(other, name).seconds / getattr(found, name).seconds
        assert ratio == pytest.approx(989 / 312)
        assert getattr(other, name).source.endswith("of a a100, as measured on a h200")


def test_a_sample_of_training_by_hand():
    seconds = devices.reckon("h100", 0.5).sample.seconds
    assert seconds == pytest.approx((4 * 180.1 + 13.1) / (989_000 / 2))


def test_an_unknown_device_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"h200, h100.*'b1'"):
        devices.reckon("b1")
    with pytest.raises(ConfigError, match="utilisation"):
        devices.reckon("h100", 1.5)


def test_the_operations_are_those_of_the_shapes():
    """Counted anew, on shapes alone."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    from ip2p_ray.benchmark.pairs import materialised_attention

    with torch.device("meta"), torch.inference_mode():
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        vae.set_attn_processor(AttnProcessor())
        encode = count_flops(lambda: vae.encoder(torch.empty(1, 3, 256, 256)))
        decode = count_flops(lambda: vae.decoder(torch.empty(1, 4, 64, 64)))
        counted = {}
        for channels, side in ((4, 64), (8, 32)):
            unet = UNet2DConditionModel(
                in_channels=channels, cross_attention_dim=768, attention_head_dim=8
            )
            inputs = (torch.empty(1, channels, side, side), torch.empty(1))
            text = torch.empty(1, 77, 768)
            with materialised_attention(unet):
                counted[side] = count_flops(partial(unet, *inputs, encoder_hidden_states=text))
        parameters = sum(each.numel() for each in unet.parameters())
    assert encode == pytest.approx(devices.ENCODE_256, rel=1e-3)
    assert decode == pytest.approx(devices.DECODE_512, rel=1e-3)
    assert counted[64] == pytest.approx(devices.UNET_512, rel=1e-3)
    assert counted[32] == pytest.approx(devices.UNET_256, rel=1e-3)
    assert parameters == devices.UNET_PARAMETERS


def test_every_price_in_the_example_is_one_and_says_that_it_is_made_up():
    import tomllib

    from ip2p_ray.estimate.config import Prices

    path = Path(__file__).parents[2] / "cluster" / "prices.example.toml"
    prices = Prices(**tomllib.loads(path.read_text("utf-8")))
    assert "not a price list" in prices.as_of
