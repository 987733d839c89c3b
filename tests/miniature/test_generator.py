"""The generator's training: frozen companions, latents encoded once, every step its own draws."""

from __future__ import annotations

import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.sample import text_to_image
from ip2p_ray.miniature import generator
from ip2p_ray.miniature.feed import pictures
from ip2p_ray.miniature.scenes import is_held_out

CONFIG = generator.GeneratorConfig(steps=3, batch_size=4, channels=(16, 16), scenes=70)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def begin(untrained: Path, folder: Path) -> Path:
    """A folder in which autoencoder, text encoder and tokenizer are trained."""
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(untrained / part, folder / part)
    return folder


@pytest.fixture(scope="module")
def trained(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = begin(untrained, tmp_path_factory.mktemp("generator") / "folder")
    figures = generator.train(CONFIG, folder, seed=1, device="cpu")
    assert figures["steps"] == 3
    return folder


def test_the_folder_is_a_generator_of_64_pixels(trained: Path) -> None:
    model = StableDiffusion.load(trained / "generator")
    assert not model.takes_image
    assert model.schedule.prediction_type == "v_prediction"
    picture = text_to_image(model, ["a red boat"], [0], height=64, width=64, steps=2)
    assert picture.shape == (1, 64, 64, 3)


def test_only_the_unet_learns(untrained: Path, trained: Path) -> None:
    for part, name in (("vae", WEIGHTS), ("text_encoder", "model.safetensors")):
        before, after = (load_file(f / part / name) for f in (untrained, trained / "generator"))
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items()), part
    torch.manual_seed(1)
    fresh = generator.build_unet(CONFIG, 16).state_dict()
    learned = load_file(trained / "generator" / "unet" / WEIGHTS)
    assert learned.keys() == fresh.keys()
    assert not torch.equal(learned["conv_out.weight"], fresh["conv_out.weight"])


def test_a_resumed_training_ends_as_an_undisturbed_one(
    untrained: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = begin(untrained, tmp_path / "folder")
    # The first step has one learning rate whatever comes after it.
    generator.train(replace(CONFIG, steps=1), folder, seed=1, device="cpu")
    pool = folder / "state" / "generator-pool.pt"
    encoded = pool.stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        generator.train(CONFIG, folder, seed=1, device="cpu")
    assert "generator: continues at step 1 of 3" in caplog.text
    assert pool.stat().st_mtime_ns == encoded
    expected, found = (load_file(f / "generator" / "unet" / WEIGHTS) for f in (trained, folder))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_the_pool_holds_the_posteriors_of_its_scenes_and_nothing_held_out(trained: Path) -> None:
    model = StableDiffusion.load(trained / "generator")
    path = trained / "state" / "generator-pool.pt"
    pool = generator._pool(model, CONFIG, 1, path)
    assert not any(map(is_held_out, pool.scenes))
    assert pool.latents.shape == (70, 2, 16, 8, 8)
    with torch.no_grad():
        mean, std = model.encode_image(pictures(pool.scenes[68:]))
    torch.testing.assert_close(pool.latents[68:, 0].float(), mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(pool.latents[68:, 1].float(), std, atol=2e-3, rtol=2e-3)


def test_a_batch_follows_its_stream_and_drops_the_share_of_captions_that_is_asked(
    trained: Path,
) -> None:
    model = StableDiffusion.load(trained / "generator")
    pool = generator._pool(model, CONFIG, 1, trained / "state" / "generator-pool.pt")
    silence = model.encode_text([""])[0]

    def batch(share: float) -> tuple[torch.Tensor, int]:
        latents, text = generator._batch(model, pool, 32, share, random.Random(0))
        return latents, sum(torch.allclose(row, silence, atol=1e-5) for row in text)

    assert torch.equal(batch(0.5)[0], batch(0.5)[0])
    assert batch(0.0)[1] == 0
    assert 4 < batch(0.5)[1] < 28
    assert batch(1.0)[1] == 32


def test_latents_of_a_batch_are_scaled_posterior_samples(trained: Path) -> None:
    model = StableDiffusion.load(trained / "generator")
    pool = generator._pool(model, CONFIG, 1, trained / "state" / "generator-pool.pt")
    certain = pool.latents.clone()
    certain[:, 1] = 0
    latents, _ = generator._batch(
        model, generator.Pool(pool.scenes, certain), 8, 0.0, random.Random(0)
    )
    means = certain[:, 0].float() * model.scaling_factor
    assert all(any(torch.equal(row, mean) for mean in means) for row in latents)
