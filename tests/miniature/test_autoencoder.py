"""Two trainings of the autoencoder: the whole, then the decoder alone."""

from __future__ import annotations

import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from ip2p_ray.miniature import autoencoder
from ip2p_ray.miniature.feed import pictures, scene_batch

CONFIG = autoencoder.AutoencoderConfig(
    steps=3, decoder_steps=3, batch_size=2, latent_channels=4, channels=(8, 8, 8, 8)
)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After the training of the whole."""
    folder: Path = tmp_path_factory.mktemp("whole")
    autoencoder.train(CONFIG, folder, seed=2, device="cpu")
    return folder


@pytest.fixture(scope="module")
def decoded(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After that of the decoder."""
    folder: Path = tmp_path_factory.mktemp("decoder") / "folder"
    shutil.copytree(trained, folder)
    figures = autoencoder.train_decoder(CONFIG, folder, seed=2, device="cpu")
    assert figures["reconstruction_mse"] > 0
    return folder


def test_training_changes_every_part_and_its_folder_loads(trained: Path) -> None:
    vae: Any = AutoencoderKL.from_pretrained(trained / "vae")
    torch.manual_seed(2)
    untrained = autoencoder.build(CONFIG).state_dict()
    found = vae.state_dict()
    assert found.keys() == untrained.keys()
    for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."):
        names = [name for name in found if name.startswith(part)]
        assert any(not torch.equal(found[name], untrained[name]) for name in names), part
    with torch.no_grad():
        latents = vae.encode(pictures(scene_batch(random.Random(0), 2))).latent_dist.mean
    assert latents.shape == (2, 4, 8, 8)


def test_the_scaling_factor_gives_latents_a_deviation_of_one(trained: Path) -> None:
    vae: Any = AutoencoderKL.from_pretrained(trained / "vae")
    stored = json.loads((trained / "vae" / "config.json").read_text())["scaling_factor"]
    with torch.no_grad():
        latents = vae.encode(pictures(scene_batch(random.Random(5), 64))).latent_dist.mean
    assert float(latents.std()) * stored == pytest.approx(1.0, rel=0.1)


def test_a_resumed_training_ends_as_an_undisturbed_one(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The first step has one learning rate whatever comes after it.
    autoencoder.train(replace(CONFIG, steps=1), tmp_path, seed=2, device="cpu")
    with caplog.at_level(logging.INFO):
        autoencoder.train(CONFIG, tmp_path, seed=2, device="cpu")
    assert "autoencoder: continues at step 1 of 3" in caplog.text
    assert_same(weights(trained), weights(tmp_path))


def test_the_decoders_training_leaves_the_latents_alone(trained: Path, decoded: Path) -> None:
    before, after = weights(trained), weights(decoded)
    changed = {
        name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    configs = [
        json.loads((each / "vae" / "config.json").read_text()) for each in (trained, decoded)
    ]
    assert configs[0]["scaling_factor"] == configs[1]["scaling_factor"] != 0.18215


def test_a_resumed_decoder_ends_as_an_undisturbed_one(
    trained: Path, decoded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(trained, folder)
    autoencoder.train_decoder(replace(CONFIG, decoder_steps=1), folder, seed=2, device="cpu")
    with caplog.at_level(logging.INFO):
        autoencoder.train_decoder(CONFIG, folder, seed=2, device="cpu")
    assert "decoder: continues at step 1 of 3" in caplog.text
    assert_same(weights(decoded), weights(folder))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_crops_are_cut_out_of_pictures() -> None:
    crops, whole = autoencoder._batches(random.Random(0), 2, "cpu")
    assert crops.shape == (8, 3, 32, 32)
    assert whole.shape == (2, 3, 64, 64)
    rng = random.Random(0)
    assert torch.equal(whole, pictures(scene_batch(rng, 2)))
    for crop, picture in zip(crops, pictures(scene_batch(rng, 8)), strict=True):
        places = picture.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        assert bool((places == crop).flatten(2).all(dim=-1).any())


def test_local_means_weigh_three_times_as_much_as_single_pixels() -> None:
    image = torch.zeros(1, 3, 8, 8)
    error, figures = autoencoder._reconstruction(image + 0.5, image)
    assert float(error) == pytest.approx(0.5 + 0.25 + 3 * 0.5)
    assert figures == {"mse": pytest.approx(0.25)}
    # A checkerboard has no error of local means.
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2 - 0.5
    error, _ = autoencoder._reconstruction(image + checks, image)
    assert float(error) == pytest.approx(0.5 + 0.25)
