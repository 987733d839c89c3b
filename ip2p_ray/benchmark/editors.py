"""The editor that is put under load: with random weights, and as diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.testing import stable_diffusion_1_5


def random_editor(device: str, dtype: torch.dtype) -> Editor:
    """An editor in the shapes of Stable Diffusion 1.5; every process makes the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = stable_diffusion_1_5(in_channels=8)
    for network in (model.unet, model.vae, model.text_encoder):
        torch.nn.Module.to(network, device=device, dtype=dtype)
    if torch.device(device).type == "cpu":  # as the service does
        for network in (model.unet, model.vae):
            torch.nn.Module.to(network, memory_format=torch.channels_last)
    return Editor(model, settings=EditSettings())


def as_pipeline(model: StableDiffusion) -> Any:
    """The pipeline of diffusers, of the very same networks; its steps are Euler-ancestral."""
    scheduler = {k: v for k, v in model.scheduler_config.items() if not k.startswith("_")}
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
