"""The reference's way to make pairs, as the published generator does it: what ours is measured by.

One pair a batch of four rows [source, edited | source, edited], the first two without text;
attention as full matrices of logits, in which the source's rows replace the edited one's;
Euler-ancestral steps over levels that lie evenly in time; both pictures decoded together. It shares
the model with our way and nothing of the sampling.

Source: METHOD section 2; written from that description.
"""

from __future__ import annotations

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

    While `copies` is True, self-attention of the edited rows takes the source rows' logits.
    """

    def __init__(self) -> None:
        self.copies = False

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
        if self.copies and encoder_hidden_states is None:
            logits[1], logits[3] = logits[0], logits[2]
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
    model: StableDiffusion, requests: Sequence[CandidateRequest], config: PairConfig
) -> tuple[Pictures, Pictures]:
    """Source and edited pictures of the requests, each uint8 (request, height, width, 3).

    The text of a triplet is encoded once for all its candidates that follow each other; of
    `config` only the resolution and the steps are read.
    """
    source, edited = [], []
    captions: tuple[str, str] | None = None
    with materialised_attention(model.unet) as attention:
        for request in requests:
            if captions != (request.caption, request.edited_caption):
                captions = (request.caption, request.edited_caption)
                text = model.encode_text(["", "", *captions])
            latents = _latents(model, request, text, config, attention)
            pictures = to_uint8(model.decode(latents))
            source.append(pictures[0])
            edited.append(pictures[1])
    return np.stack(source), np.stack(edited)


def _latents(
    model: StableDiffusion,
    request: CandidateRequest,
    text: Tensor,
    config: PairConfig,
    attention: MaterialisedAttention,
) -> Tensor:
    """Scaled latents (2, channel, height, width) of the source and the edited picture."""
    generator = torch.Generator("cpu").manual_seed(request.seed)
    shape = (1, model.latent_channels, *model.latent_size(config.resolution, config.resolution))

    def noise() -> Tensor:
        drawn = torch.randn(shape, generator=generator).to(model.device)
        return drawn.expand(2, -1, -1, -1)

    def denoised(x: Tensor, step: int, sigma: float) -> Tensor:
        attention.copies = request.self_replace > step / max(config.steps - 1, 1)
        levels = torch.full((4,), sigma, device=x.device)
        rows = model.denoise(torch.cat([x, x]), levels, text)
        without, with_text = rows.chunk(2)
        return without + request.guidance_scale * (with_text - without)

    sigmas = model.schedule.sigmas(config.steps).tolist()
    return _euler_ancestral(noise() * sigmas[0], sigmas, denoised, noise)


def _euler_ancestral(
    x: Tensor,
    sigmas: list[float],
    denoised: Callable[[Tensor, int, float], Tensor],
    noise: Callable[[], Tensor],
) -> Tensor:
    for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        share = after**2 * (sigma**2 - after**2) / sigma**2
        up = min(after, share**0.5)
        down = (after**2 - up**2) ** 0.5
        x = x + (x - denoised(x, step, sigma)) / sigma * (down - sigma)
        if after > 0:
            x = x + up * noise()
    return x
