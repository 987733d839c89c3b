from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from torch import Tensor

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError
from ip2p_ray.testing import tiny_stable_diffusion


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.inference_mode()
def test_denoising_inverts_the_parametrisation(prediction_type: str) -> None:
    """Noise and v, worked out of the denoised image, are what the UNet says, row by row."""
    model = tiny_stable_diffusion(prediction_type=prediction_type)
    text = model.encode_text(["a cat", "a dog", ""])
    sigma = torch.tensor([14.0, 1.0, 0.05])
    x = noise(3, 4, 8, 8) * (1 + sigma.reshape(-1, 1, 1, 1))
    denoised = model.denoise(x, sigma, text)
    for row in range(3):
        alpha = 1 / (1 + sigma[row].double() ** 2)
        timestep = model.schedule.timestep(sigma[row : row + 1])
        inputs = x[row : row + 1] * alpha.sqrt().float()
        predicted = model.unet(inputs, timestep, text[row : row + 1]).sample[0].double()
        clean = denoised[row].double()
        eps = (x[row] - clean) / sigma[row]
        if prediction_type == "v_prediction":
            eps = alpha.sqrt() * eps - (1 - alpha).sqrt() * clean
        torch.testing.assert_close(eps, predicted, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_rows_are_denoised_alike_in_any_batch() -> None:
    model = tiny_stable_diffusion()
    x, sigma = noise(3, 4, 8, 6), torch.tensor([9.0, 0.3, 2.0])
    text = model.encode_text(["a cat", "", "a dog"])
    together = model.denoise(x, sigma, text)
    for row in range(3):
        alone = model.denoise(x[row : row + 1], sigma[row : row + 1], text[row : row + 1])
        tolerance = 1e-5 * (1 + sigma[row].item())
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=tolerance)


@torch.inference_mode()
def test_an_editor_reads_image_latents_unscaled() -> None:
    model = tiny_stable_diffusion(in_channels=8)
    assert model.takes_image
    x, image = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1)
    sigma, text = torch.tensor([3.0]), model.encode_text(["add snow"])
    denoised = model.denoise(x, sigma, text, image)
    inputs = torch.cat([x / 10**0.5, image], dim=1)
    eps = model.unet(inputs, model.schedule.timestep(sigma), text).sample
    torch.testing.assert_close(denoised, x - 3 * eps)
    with pytest.raises(ConfigError, match="8 channels needs image_latents"):
        model.denoise(x, sigma, text)
    with pytest.raises(ConfigError, match="4 channels takes no image_latents"):
        tiny_stable_diffusion().denoise(x, sigma, text, image)


def test_gradients_flow_to_the_unet_and_the_text_encoder() -> None:
    model = tiny_stable_diffusion()
    text = model.encode_text(["a cat"])
    loss = model.denoise(noise(1, 4, 8, 8), torch.ones(1), text).square().mean()
    for network in (model.unet, model.text_encoder):
        weights = list(network.parameters())
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        assert any(gradient.abs().sum() > 0 for gradient in gradients if gradient is not None)


@torch.inference_mode()
def test_images_are_encoded_unscaled_and_decoded_scaled() -> None:
    model = tiny_stable_diffusion()
    images = noise(2, 3, 16, 24).clamp(-1, 1)
    mean, std = model.encode_image(images)
    posterior = model.vae.encode(images).latent_dist
    assert torch.equal(mean, posterior.mode())
    assert torch.equal(std, posterior.std)
    assert mean.shape == (2, 4, *model.latent_size(16, 24))
    decoded = model.decode(mean * model.scaling_factor)
    torch.testing.assert_close(decoded, model.vae.decode(mean).sample)
    assert decoded.shape == images.shape


@pytest.mark.parametrize("size", [(15, 16), (16, 1), (0, 16)])
def test_sizes_must_fit_the_autoencoder(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="multiples of 2"):
        tiny_stable_diffusion().latent_size(*size)


@torch.inference_mode()
def test_text_is_padded_and_cut_to_the_text_length() -> None:
    model = tiny_stable_diffusion()
    text = model.encode_text(["", "a cat " * 20])
    assert text.shape == (2, model.text_length, 24)
    ids = model.tokenizer("a cat " * 20, truncation=True, max_length=16)["input_ids"]
    expected = model.text_encoder(torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(text[1:], expected)


@pytest.mark.parametrize("channels", [4, 8])
@torch.inference_mode()
def test_saved_and_loaded_it_is_the_same_model(channels: int, tmp_path: Path) -> None:
    model = tiny_stable_diffusion(
        seed=3, prediction_type="v_prediction", latent_channels=channels, in_channels=2 * channels
    )
    model.save(tmp_path / "model")
    loaded = StableDiffusion.load(tmp_path / "model")
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.scheduler_config == model.scheduler_config
    assert loaded.latent_channels == channels
    assert loaded.text_length == model.text_length
    assert not loaded.unet.training
    x, image, sigma = noise(1, channels, 8, 8), noise(1, channels, 8, 8), torch.tensor([2.0])
    for text in (["a chinchilla, on the mat"], [""]):
        ours = model.denoise(x, sigma, model.encode_text(text), image)
        theirs = loaded.denoise(x, sigma, loaded.encode_text(text), image)
        # mapped files lie elsewhere in memory, which may choose other kernels
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_weights_may_be_stored_in_half_and_computed_in_any_precision(tmp_path: Path) -> None:
    model = tiny_stable_diffusion()
    model.save(tmp_path / "half", dtype=torch.float16)
    assert model.dtype == torch.float32
    stored = sum(file.stat().st_size for file in (tmp_path / "half").rglob("*.safetensors"))
    networks = (model.unet, model.vae, model.text_encoder)
    assert stored < 2.5 * sum(p.numel() for n in networks for p in n.parameters())
    full = StableDiffusion.load(tmp_path / "half")
    brain = StableDiffusion.load(tmp_path / "half", dtype=torch.bfloat16)
    assert full.dtype == full.text_encoder.dtype == full.vae.dtype == torch.float32
    assert brain.dtype == brain.text_encoder.dtype == brain.vae.dtype == torch.bfloat16
    x, sigma = noise(1, 4, 8, 8), torch.tensor([1.0])
    exact = model.denoise(x, sigma, model.encode_text(["a cat"]))
    for other in (full, brain):
        denoised = other.denoise(x, sigma, other.encode_text(["a cat"]))
        assert denoised.dtype == torch.float32
        torch.testing.assert_close(denoised, exact, rtol=0, atol=0.1)
        assert other.decode(x).dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("in_channels", "kind"),
    [(4, StableDiffusionPipeline), (8, StableDiffusionInstructPix2PixPipeline)],
)
def test_diffusers_loads_a_saved_folder(in_channels: int, kind: Any, tmp_path: Path) -> None:
    model = tiny_stable_diffusion(in_channels=in_channels)
    model.save(tmp_path / "model")
    pipeline = kind.from_pretrained(tmp_path / "model", safety_checker=None)
    assert pipeline.tokenizer("a chinchilla").input_ids == model.tokenizer("a chinchilla").input_ids
    for name, weight in model.unet.state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[name], weight)
    pipeline.save_pretrained(tmp_path / "again")
    assert StableDiffusion.load(tmp_path / "again").takes_image == (in_channels == 8)


def test_fingerprints_follow_weights_configs_and_words_but_not_use() -> None:
    model = tiny_stable_diffusion()
    before = model.fingerprint()
    assert before == tiny_stable_diffusion().fingerprint()
    with torch.inference_mode():
        model.encode_text(["a cat"])
    assert model.fingerprint() == before
    assert len(before) == 32
    others = [
        tiny_stable_diffusion(seed=1).fingerprint(),
        tiny_stable_diffusion(prediction_type="v_prediction").fingerprint(),
    ]
    next(model.text_encoder.parameters()).data[0, 0] += 1
    others.append(model.fingerprint())
    torch.nn.Module.to(model.unet, torch.bfloat16)
    others.append(model.fingerprint())
    assert len({before, *others}) == 5
