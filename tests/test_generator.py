"""Batches that fit, weights that fit, and pictures that do not depend on how they were held."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.generator import Generator, GeneratorWeights, Holding
from ip2p_ray.pairs import PairConfig, candidate_requests
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.testing import tiny_stable_diffusion

CONFIG = PairConfig(resolution=32, steps=2, candidates=5, sampler="euler_ancestral")


class Cramped(StableDiffusion):
    """A model whose device holds only so many rows at a time."""

    rows = 0

    def denoise(self, x, *arguments, **named):
        if len(x) > self.rows:
            raise torch.OutOfMemoryError(f"tried to allocate {len(x)} rows, {self.rows} are free")
        return super().denoise(x, *arguments, **named)


@pytest.fixture(scope="module")
def model():
    return tiny_stable_diffusion()


def requests(count=5):
    return candidate_requests("a" * 32, "a red cat", "a blue cat", CONFIG, "recipe")[:count]


def pictures(model, holding, count=5):
    batches = list(Generator(model, holding).make(requests(count), CONFIG))
    assert [r.index for b in batches for r in b.requests] == list(range(count))
    assert all(batch.seconds > 0 for batch in batches)
    return [len(b.requests) for b in batches], np.concatenate([b.edited for b in batches])


def off(left, right):
    return np.abs(left.astype(int) - right.astype(int)).max()


def test_the_same_batches_give_the_same_bytes_and_others_nearly(model):
    sizes, three = pictures(model, Holding(batch_size=3))
    again, same = pictures(model, Holding(batch_size=3))
    assert sizes == again == [3, 2]
    assert (three == same).all()
    for size in (1, 2, 5, 8):
        assert off(three, pictures(model, Holding(batch_size=size))[1]) <= 1


def test_the_fill_of_each_batch_is_told(model):
    told = []
    generator = Generator(
        model, Holding(batch_size=3), filled=lambda rows, places: told.append((rows, places))
    )
    assert len(list(generator.make(requests(5), CONFIG))) == 2
    assert told == [(3, 3), (2, 3)]


def test_in_bfloat16_other_batches_give_the_same_up_to_its_rounding(model, tmp_path):
    model.save(tmp_path / "sd")
    half = GeneratorWeights(source=str(tmp_path / "sd"), dtype="bfloat16").load()
    five = pictures(half, Holding(batch_size=5))[1]
    assert (five == pictures(half, Holding(batch_size=5))[1]).all()
    for size in (1, 2, 3):
        assert off(five, pictures(half, Holding(batch_size=size))[1]) <= 4  # of 255


def test_decoding_has_a_batch_of_its_own(model):
    asked = []

    class Watched(StableDiffusion):
        def decode(self, latents):
            asked.append(len(latents))
            return super().decode(latents)

    found = pictures(Watched(**vars(model)), Holding(batch_size=5, decode_batch=4))[1]
    assert asked == [4, 4, 2]
    assert off(found, pictures(model, Holding(batch_size=5))[1]) <= 1


def test_a_batch_that_does_not_fit_is_halved_once_and_for_all(model, caplog):
    cramped = Cramped(**vars(model))
    cramped.rows = 8  # two candidates of four rows
    generator = Generator(cramped, Holding(batch_size=8))
    with caplog.at_level(logging.WARNING, logger="ip2p_ray.memory"):
        first = list(generator.make(requests(), CONFIG))
        second = list(generator.make(requests(3), CONFIG))
    assert [len(batch.requests) for batch in first] == [2, 2, 1]
    assert [len(batch.requests) for batch in second] == [2, 1]
    assert [record.message for record in caplog.records] == [
        "generator: 5 candidates at a time do not fit on cpu, goes on with 2"
    ]
    assert off(np.concatenate([b.edited for b in first]), pictures(model, Holding())[1]) <= 1


def test_one_candidate_that_does_not_fit_ends_the_run_with_need_and_have(model):
    cramped = Cramped(**vars(model))
    cramped.rows = 3
    with pytest.raises(ModelError) as caught:
        list(Generator(cramped, Holding(batch_size=2)).make(requests(), CONFIG))
    assert "not even 1 at a time fit: the weights hold 0.0 GiB" in str(caught.value)
    assert "GiB are free on cpu" in str(caught.value)
    assert "tried to allocate 4 rows" in str(caught.value)


def test_another_error_is_not_taken_for_a_lack_of_memory(model):
    class Broken(StableDiffusion):
        def denoise(self, x, *arguments, **named):
            raise RuntimeError("a kernel failed")

    with pytest.raises(RuntimeError, match="a kernel failed"):
        list(Generator(Broken(**vars(model)), Holding()).make(requests(), CONFIG))


def test_weights_take_the_dtype_and_are_another_model(model, tmp_path):
    model.save(tmp_path / "sd")
    single = GeneratorWeights(source=str(tmp_path / "sd")).load()
    half = GeneratorWeights(source=str(tmp_path / "sd"), dtype="bfloat16").load()
    assert half.dtype == torch.bfloat16
    assert half.fingerprint() != single.fingerprint() == model.fingerprint()
    # 8 bits of mantissa through two steps
    assert off(pictures(half, Holding())[1], pictures(single, Holding())[1]) <= 64


def test_a_tiny_autoencoder_takes_the_place_of_the_models_own(model, tmp_path):
    torch.manual_seed(0)
    channels = (8,) * len(model.vae.config["block_out_channels"])
    tiny = AutoencoderTiny(
        latent_channels=model.latent_channels,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1,) * len(channels),
        num_decoder_blocks=(1,) * len(channels),
    )
    tiny.save_pretrained(tmp_path / "tiny")
    model.save(tmp_path / "sd")
    weights = GeneratorWeights(source=str(tmp_path / "sd"), vae=str(tmp_path / "tiny"))
    held = weights.load()
    assert isinstance(held.vae, AutoencoderTiny)
    assert held.fingerprint() != model.fingerprint()
    found = pictures(held, Holding())[1]
    assert found.shape == (5, 32, 32, 3)
    with torch.inference_mode():
        latents = torch.randn(1, model.latent_channels, 4, 4)
        assert torch.allclose(held.decode(latents), tiny.decode(latents).sample, atol=1e-5)


def test_what_is_no_autoencoder_is_named(model, tmp_path):
    model.save(tmp_path / "sd")
    source = str(tmp_path / "sd")
    with pytest.raises(ModelError, match=r"autoencoder .*unet is a UNet2DConditionModel"):
        GeneratorWeights(source=source, vae=f"{source}/unet").load()
    with pytest.raises(
        ModelError,
        match=r"autoencoder of model .*no \(no folder here, so a hub id\) cannot be read",
    ):
        GeneratorWeights(source=source, vae=str(tmp_path / "no")).load()


def test_channels_last_changes_nothing_but_rounding():
    held, plain = tiny_stable_diffusion(), tiny_stable_diffusion()
    found = pictures(held, Holding(channels_last=True))[1]
    assert held.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert off(found, pictures(plain, Holding())[1]) <= 1


@pytest.mark.slow
def test_compiled_it_makes_the_same_and_fills_up_the_last_batch():
    held, plain = tiny_stable_diffusion(), tiny_stable_diffusion()
    sizes, found = pictures(held, Holding(compile=True, batch_size=3))
    assert sizes == [3, 2]
    assert off(found, pictures(plain, Holding(batch_size=3))[1]) <= 1


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"decode_batch": 0}])
def test_sizes_are_at_least_one(wrong):
    with pytest.raises(ConfigError, match="is at least 1, got 0"):
        Holding(**wrong)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="float32, bfloat16, float16, got 'int8'"):
        replace(GeneratorWeights(source="s"), dtype="int8")


def test_a_search_that_does_not_fit_goes_on_with_half(model, tiny_weights):
    judge = Clip.load(tiny_weights / "judge")
    cramped = Cramped(**vars(model))
    cramped.rows = 8
    rows = [
        {"triplet_key": letter * 32, "caption": f"a {letter} cat", "edited_caption": "a dog"}
        for letter in "abc"
    ]
    options = SearchConfig()
    found = {
        size: {
            one.triplet["triplet_key"]: one
            for one in Generator(held, Holding(batch_size=size)).search(
                judge, rows, CONFIG, options, "recipe"
            )
        }
        for size, held in ((8, cramped), (2, model))
    }
    assert found[8].keys() == found[2].keys() == {row["triplet_key"] for row in rows}
    for key, one in found[8].items():
        other = found[2][key]
        assert [c.request for c in one.candidates] == [c.request for c in other.candidates]
        for left, right in zip(one.candidates, other.candidates, strict=True):
            assert left.similarities == pytest.approx(right.similarities, abs=1e-3)
