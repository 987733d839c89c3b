"""The loss on pairs that are never trained on, always with the same noise."""

from __future__ import annotations

import torch
from torch import nn

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.training.feed import (
    Batch,
    Latents,
    PictureBatch,
    Pictures,
    Visit,
    read_batch,
    read_pictures,
)
from ip2p_ray.training.inputs import InputMaker
from ip2p_ray.training.loss import editing_loss

EPOCH = -1
"""Of the random streams: no training meets it."""

SEED = 0
"""Not the run's, so that runs with different seeds are measured alike."""


@torch.no_grad()
def validation_loss(
    model: StableDiffusion,
    unet: nn.Module,
    dataset: Latents | Pictures,
    *,
    groups: int,
    batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
    bf16: bool = False,
) -> float:
    """The mean loss of the first `groups` groups, over all ranks, without dropout or flips.

    Noise and timesteps of a group are the same at every call, so that two values differ by the
    weights only, and a resumed run goes on with the same figures. Every rank calls it.

    Source: the reference's validation applies dropout too, and draws noise anew each time.
    """
    device = next(unet.parameters()).device
    inputs = InputMaker(model, device)
    own = range(rank, min(groups, len(dataset)), world_size)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    training = unet.training
    unet.eval()
    for start in range(0, len(own), batch_size):
        visits = [Visit(EPOCH, group) for group in own[start : start + batch_size]]
        found = inputs(_read(dataset, visits), 0.0)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            losses = editing_loss(
                unet,
                model.schedule,
                latents=found.latents,
                image_latents=found.image_latents,
                text=found.text,
                noise=found.noise,
                timesteps=found.timesteps,
            )
        total += torch.tensor([float(losses.sum()), len(visits)], device=device)
    unet.train(training)
    if world_size > 1:
        torch.distributed.all_reduce(total)
    return float(total[0] / total[1])


def _read(dataset: Latents | Pictures, visits: list[Visit]) -> Batch | PictureBatch:
    if isinstance(dataset, Pictures):
        return read_pictures(dataset, visits, SEED, flips=False)
    return read_batch(dataset, visits, SEED, flips=False)
