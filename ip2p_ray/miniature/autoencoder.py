"""Training of the miniature's AutoencoderKL: 64x64 pictures to 8x8 latents of 16 channels.

Half of what it sees are 32x32 crops around things: backdrops are learned soon, the shapes and
colours of things late, and a crop costs a quarter of a picture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ip2p_ray.miniature import parallel
from ip2p_ray.miniature.drawing import SIZE
from ip2p_ray.miniature.feed import pictures, scene_batch, step_random
from ip2p_ray.miniature.fit import FitConfig, fit, save_module
from ip2p_ray.model_files import SAFETENSORS

CROP = 32


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """How the autoencoder is built and trained."""

    steps: int = 2_700
    """Steps of the whole autoencoder."""
    decoder_steps: int = 2_500
    """Steps of the decoder alone afterwards."""
    batch_size: int = 8
    """Whole pictures a step; four times as many crops come with them."""
    learning_rate: float = 1e-3
    kl_weight: float = 1e-4
    """Weight of the mean KL divergence a latent number, in nats, beside the mean absolute error."""
    latent_channels: int = 16
    channels: tuple[int, ...] = (16, 32, 64, 96)


def build(config: AutoencoderConfig) -> AutoencoderKL:
    """The untrained autoencoder."""
    levels = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=64,
    )


def train(config: AutoencoderConfig, folder: Path, *, seed: int, device: str) -> dict[str, float]:
    """Train (or resume) and save `folder`/vae with the measured scaling factor in its config."""
    torch.manual_seed(seed)
    vae: Any = build(config).to(device)
    count = parallel.share(config.batch_size)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = step_random("autoencoder", seed, step, rank=parallel.rank())
        torch.manual_seed(rng.getrandbits(60))
        value = torch.zeros((), device=device)
        figures: dict[str, float] = {}
        for images in _batches(rng, count, device):
            with torch.autocast(device, torch.bfloat16):
                posterior = vae.encode(images).latent_dist
                decoded = vae.decode(posterior.sample()).sample
            error, figures = _reconstruction(decoded.float(), images)
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
            value = value + (error + config.kl_weight * kl) / 2
        return value, {**figures, "kl": float(kl.detach())}

    fit_config = FitConfig(steps=config.steps, learning_rate=config.learning_rate)
    result = fit("autoencoder", vae, loss, fit_config, folder / "state")
    vae.register_to_config(scaling_factor=_scaling_factor(vae, seed, device))
    if not parallel.rank():
        save_module(vae, folder / "vae")
    return {**result, "scaling_factor": vae.config["scaling_factor"]}


def train_decoder(
    config: AutoencoderConfig, folder: Path, *, seed: int, device: str
) -> dict[str, float]:
    """Go on with the decoder alone (or resume) and save it into `folder`/vae.

    The latents stay what they are, so a generator can be trained on them meanwhile. Stable
    Diffusion's later autoencoders (ft-EMA, ft-MSE) came about the same way.
    """
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae", **SAFETENSORS).to(device)
    count = parallel.share(config.batch_size)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = step_random("decoder", seed, step, rank=parallel.rank())
        torch.manual_seed(rng.getrandbits(60))
        value = torch.zeros((), device=device)
        figures: dict[str, float] = {}
        for images in _batches(rng, count, device):
            with torch.autocast(device, torch.bfloat16):
                with torch.no_grad():
                    latents = vae.encode(images).latent_dist.sample()
                decoded = vae.decode(latents).sample
            error, figures = _reconstruction(decoded.float(), images)
            value = value + error / 2
        return value, figures

    fit_config = FitConfig(steps=config.decoder_steps, learning_rate=config.learning_rate)
    result = fit("decoder", decoder, loss, fit_config, folder / "state")
    if not parallel.rank():
        save_module(vae, folder / "vae")
    return {**result, "reconstruction_mse": _held_out_error(vae, seed, device)}


def _batches(rng: random.Random, count: int, device: str) -> tuple[Tensor, Tensor]:
    """(crops around things, whole pictures), the whole pictures last."""
    whole = pictures(scene_batch(rng, count))
    scenes = scene_batch(rng, 4 * count)
    crops = []
    for scene, picture in zip(scenes, pictures(scenes), strict=True):
        layout = scene.layout
        centre = rng.choice((layout.left, layout.right)[: len(scene.things)])
        if len(scene.things) == 1 and not layout.first_left:
            centre = layout.right
        left = min(max(centre - CROP // 2 + rng.randint(-6, 6), 0), SIZE - CROP)
        middle = layout.baseline - layout.size // 2
        top = min(max(middle - CROP // 2 + rng.randint(-6, 6), 0), SIZE - CROP)
        crops.append(picture[:, top : top + CROP, left : left + CROP])
    return torch.stack(crops).to(device), whole.to(device)


def _reconstruction(decoded: Tensor, images: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Absolute and squared error, and the absolute error of local means: colour before outline."""
    absolute, squared = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
    means = F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(images, 4))
    return absolute + squared + 3.0 * means, {"mse": float(squared.detach())}


@torch.no_grad()
def _scaling_factor(vae: Any, seed: int, device: str) -> float:
    """1 / standard deviation of the latents of 1,024 scenes."""
    rng = step_random("autoencoder-scale", seed, 0)
    parts = [pictures(scene_batch(rng, 32)).to(device) for _ in range(32)]
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
    return float(1.0 / latents.std())


@torch.no_grad()
def _held_out_error(vae: Any, seed: int, device: str) -> float:
    """Mean squared error in [-1, 1] of 256 held-out scenes."""
    rng = step_random("autoencoder-test", seed, 0)
    errors = []
    for _ in range(8):
        images = pictures(scene_batch(rng, 32, held_out=True)).to(device)
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
        errors.append(float(F.mse_loss(decoded.clamp(-1, 1), images)))
    return sum(errors) / len(errors)
