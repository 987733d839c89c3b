"""The reference's way to make pairs, as the published generator does it: what ours is measured by.

One pair a batch of four rows [source, edited | source, edited], the first two without text;
attention as full matrices of logits, in which the source's rows replace the edited one's;
Euler-ancestral steps over levels that lie evenly in time; all pictures of a batch decoded together.
It shares the model with our way and nothing of the sampling.

Source: METHOD section 2; written from that description.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.images import to_uint8
from ip2p_ray.pairs import CandidateRequest, PairConfig, Pictures


class MaterialisedAttention:
    """An attention processor that computes softmax(Q K) V with every matrix in memory.

    In self-attention the edited rows of `copying` pairs take their source rows' logits.
    """

    def __init__(self) -> None:
        self.copying: list[int] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The layer's output for hidden states (row, position, channel)."""
        del attention_mask, temb  # a UNet of Stable Diffusion has neither here
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for layer, states in (
                (attn.to_q, hidden_states),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        )
        logits = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        if encoder_hidden_states is None:
            pairs = logits.shape[0] // 4
            for pair in self.copying:
                logits[pairs + pair] = logits[pair]
                logits[3 * pairs + pair] = logits[2 * pairs + pair]
        attended = logits.softmax(3) @ value
        output: Tensor = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
        return output


@contextmanager
def materialised_attention(unet: Any) -> Iterator[MaterialisedAttention]:
    """The processor of all layers of `unet` while the block runs."""
    before = dict(unet.attn_processors)
    processor = MaterialisedAttention()
    unet.set_attn_processor(processor)
    try:
        yield processor
    finally:
        unet.set_attn_processor(before)


@torch.inference_mode()
def reference_candidates(
    model: StableDiffusion,
    requests: Sequence[CandidateRequest],
    config: PairConfig,
    *,
    batch_size: int = 1,
) -> tuple[Pictures, Pictures]:
    """Source and edited pictures of the requests, each uint8 (request, height, width, 3).

    The reference has a `batch_size` of one pair; more are for measuring the memory its matrices
    take. The text of a triplet is encoded once for all its candidates that follow each other. Of
    `config` only the resolution and the steps are read.
    """
    source, edited = [], []
    captions: list[str] = []
    with materialised_attention(model.unet) as attention:
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            wanted = [request.caption for request in batch]
            wanted += [request.edited_caption for request in batch]
            if captions != wanted:
                captions = wanted
                text = model.encode_text([""] * len(wanted) + wanted)
            latents = reference_latents(model, batch, text, config, attention)
            pictures = to_uint8(model.decode(latents))
            source.append(pictures[: len(batch)])
            edited.append(pictures[len(batch) :])
    return np.concatenate(source), np.concatenate(edited)


@torch.inference_mode()
def reference_latents(
    model: StableDiffusion,
    batch: Sequence[CandidateRequest],
    text: Tensor,
    config: PairConfig,
    attention: MaterialisedAttention,
) -> Tensor:
    """Scaled latents of the sources, then of the edited pictures, (2 x pair, channel, ...).

    `text` is (4 x pair, token, channel), that of "" for the first half of the rows, and `attention`
    the processor that the model's UNet has now.
    """
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in batch]
    shape = (1, model.latent_channels, *model.latent_size(config.resolution, config.resolution))
    scales = torch.tensor([request.guidance_scale for request in batch] * 2, device=model.device)
    scales = scales.reshape(-1, 1, 1, 1)

    def noise() -> Tensor:
        drawn = torch.cat([torch.randn(shape, generator=each) for each in generators])
        return torch.cat([drawn, drawn]).to(model.device)

    def denoised(x: Tensor, step: int, sigma: float) -> Tensor:
        passed = step / max(config.steps - 1, 1)
        attention.copying = [p for p, each in enumerate(batch) if each.self_replace > passed]
        levels = torch.full((2 * x.shape[0],), sigma, device=x.device)
        without, with_text = model.denoise(torch.cat([x, x]), levels, text).chunk(2)
        return without + scales * (with_text - without)

    sigmas = model.schedule.sigmas(config.steps).tolist()
    return _euler_ancestral(noise() * sigmas[0], sigmas, denoised, noise)


def _euler_ancestral(
    x: Tensor,
    sigmas: Sequence[float],
    denoised: Callable[[Tensor, int, float], Tensor],
    noise: Callable[[], Tensor],
) -> Tensor:
    for step, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        share = after**2 * (sigma**2 - after**2) / sigma**2
        up = min(after, share**0.5)
        down = (after**2 - up**2) ** 0.5
        x = x + (x - denoised(x, step, sigma)) / sigma * (down - sigma)
        if after > 0:
            x = x + up * noise()
    return x
