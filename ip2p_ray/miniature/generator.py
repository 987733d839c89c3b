"""Training of the miniature's generator: a Stable Diffusion of drawn scenes.

The text encoder and the autoencoder come frozen from their own training; only the UNet learns, by
v-prediction on the noise levels of Stable Diffusion's schedule.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ip2p_ray.atomic import atomic_file
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.noise import NoiseSchedule
from ip2p_ray.miniature import parallel
from ip2p_ray.miniature.feed import captions, pictures, scene_batch, step_random
from ip2p_ray.miniature.fit import FitConfig, fit, read_state
from ip2p_ray.miniature.pace import Pace
from ip2p_ray.miniature.scenes import Scene
from ip2p_ray.model_files import SAFETENSORS

SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "linspace",
}
"""Stable Diffusion 1.5's schedule, but v-prediction, which small models learn sooner."""


@dataclass(frozen=True)
class Pool:
    """Scenes and their latents, float16 (scene, mean or std, channel, height, width)."""

    scenes: list[Scene]
    latents: Tensor


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """How the UNet is built and trained."""

    steps: int = 10_600
    batch_size: int = 64
    learning_rate: float = 1e-3
    empty_captions: float = 0.1
    """Share of captions replaced by "", for classifier-free guidance."""
    channels: tuple[int, int] = (64, 96)
    scenes: int = 24_000
    """Drawn scenes to learn from; encoding each once costs less than drawing anew every step."""


def build_unet(config: GeneratorConfig, latent_channels: int) -> UNet2DConditionModel:
    """A UNet with self- and cross-attention at both levels, of 64 and of 16 positions."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=config.channels,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def train(config: GeneratorConfig, folder: Path, *, seed: int, device: str) -> dict[str, float]:
    """Train (or resume) and save `folder`/generator, a diffusers folder."""
    torch.manual_seed(seed)
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae", **SAFETENSORS)
    vae.eval().requires_grad_(False)
    text_encoder: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", **SAFETENSORS)
    text_encoder.requires_grad_(False)
    model = StableDiffusion(
        unet=build_unet(config, vae.config["latent_channels"]).to(
            device, memory_format=torch.channels_last
        ),
        vae=vae.to(device),
        text_encoder=text_encoder.to(device),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        schedule=NoiseSchedule.from_config(SCHEDULER),
        scheduler_config=SCHEDULER,
    )
    pool = _pool(model, config, seed, folder / "state" / "generator-pool.pt")
    alphas = model.schedule.alphas_cumprod.float().to(device)
    count = parallel.share(config.batch_size)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = step_random("generator", seed, step, rank=parallel.rank())
        latents, text = _batch(model, pool, count, config.empty_captions, rng)
        noise_source = torch.Generator().manual_seed(rng.getrandbits(60))
        noise = torch.randn(latents.shape, generator=noise_source).to(device)
        # Stratified over the batch: every step sees all noise levels.
        offsets = torch.rand(len(latents), generator=noise_source)
        timesteps = ((torch.arange(len(latents)) + offsets) * (len(alphas) / len(latents))).long()
        timesteps = timesteps.to(device)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        predicted = model.unet(noisy, timesteps, encoder_hidden_states=text).sample
        return (predicted - target).square().mean(), {}

    fit_config = FitConfig(steps=config.steps, learning_rate=config.learning_rate, ema_decay=0.999)
    result = fit("generator", model.unet, loss, fit_config, folder / "state")
    if not parallel.rank():
        model.save(folder / "generator")
    return result


def _pool(model: StableDiffusion, config: GeneratorConfig, seed: int, path: Path) -> Pool:
    """Drawn scenes with their latents, encoded once and kept in `path` for the next start."""
    scenes = scene_batch(step_random("generator-pool", seed, 0), config.scenes)
    if not parallel.rank() and not path.exists():
        latents = _encode(model, scenes)
        with atomic_file(path) as new:
            torch.save(latents, new)
    parallel.meet()
    return Pool(scenes, read_state(path))


@torch.no_grad()
def _encode(model: StableDiffusion, scenes: list[Scene]) -> Tensor:
    """float16 (scene, mean or std, channel, height, width)."""
    pace = Pace("generator's scenes", len(scenes), unit="scene")
    parts = []
    for start in range(0, len(scenes), 64):
        drawn = pictures(scenes[start : start + 64])
        parts.append(torch.stack(model.encode_image(drawn), dim=1).half().cpu())
        pace.tick(start + len(drawn))
    return torch.cat(parts)


@torch.no_grad()
def _batch(
    model: StableDiffusion, pool: Pool, count: int, empty_captions: float, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """(scaled latents, text states) of `count` scenes from the pool, captions worded anew."""
    rows = [rng.randrange(len(pool.scenes)) for _ in range(count)]
    scenes = [pool.scenes[row] for row in rows]
    texts = ["" if rng.random() < empty_captions else c for c in captions(scenes, rng)]
    mean, std = pool.latents[rows].float().unbind(dim=1)
    source = torch.Generator().manual_seed(rng.getrandbits(60))
    sampled = mean + std * torch.randn(mean.shape, generator=source)
    return sampled.to(model.device) * model.scaling_factor, model.encode_text(texts)
