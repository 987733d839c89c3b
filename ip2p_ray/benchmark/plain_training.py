"""The plain way to train an editor, as the public example does: what our loop is measured by.

Every step decodes its pictures, runs the autoencoder over both of them and the text encoder over
the instructions and the empty text, all of it in float32 and eagerly, in one thread of Python, with
AdamW as torch has it by default. No average is kept. It shares the model with our loop and nothing
of the training.

Source: METHOD sections 4 and 7 (T20); written from that description.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.images import decode_image, to_tensor


class Example(NamedTuple):
    """A pair as it is stored."""

    source: bytes
    edited: bytes
    instruction: str


class Drawn(NamedTuple):
    """What is random in a step; (row, channel, height, width), (row,) and (row,)."""

    posterior_noise: Tensor
    noise: Tensor
    timesteps: Tensor
    dropout: Tensor


class PlainTrainer:
    """Trains a model whose UNet takes an image, on examples in their order."""

    def __init__(
        self,
        model: StableDiffusion,
        examples: Sequence[Example],
        *,
        batch_size: int,
        learning_rate: float,
        seed: int = 0,
    ) -> None:
        self._model, self._batch_size = model, batch_size
        self._examples = itertools.cycle(examples)
        self._optimizer = torch.optim.AdamW(model.unet.parameters(), lr=learning_rate)
        self._generator = torch.Generator(model.device).manual_seed(seed)

    @property
    def state_bytes(self) -> int:
        """Of the optimizer's moments."""
        return sum(
            value.numel() * value.element_size()
            for moments in self._optimizer.state.values()
            for value in moments.values()
        )

    def step(self, drawn: Drawn | None = None) -> float:
        """The loss of one optimizer step."""
        model = self._model
        examples = list(itertools.islice(self._examples, self._batch_size))
        source, edited = (
            torch.stack([to_tensor(decode_image(getattr(example, name))) for example in examples])
            for name in ("source", "edited")
        )
        with torch.no_grad():
            posterior = model.vae.encode(edited.to(model.device)).latent_dist
            image_latents = model.vae.encode(source.to(model.device)).latent_dist.mode()
            text = model.encode_text([example.instruction for example in examples])
            null = model.encode_text([""])
        drawn = drawn or self._draw(posterior.mean)
        latents = posterior.mean + posterior.std * drawn.posterior_noise.to(model.device)
        latents = latents * model.scaling_factor
        count = len(model.schedule.alphas_cumprod)
        timesteps = (drawn.timesteps * count).long().to(model.device)
        abar = model.schedule.alphas_cumprod.to(latents)[timesteps.to(latents.device)]
        signal, spread = (value.sqrt()[:, None, None, None] for value in (abar, 1 - abar))
        noise = drawn.noise.to(model.device)
        noisy = signal * latents + spread * noise
        target = noise
        if model.schedule.prediction_type == "v_prediction":
            target = signal * noise - spread * latents
        uniform = drawn.dropout.to(model.device)
        text = torch.where((uniform < 0.1)[:, None, None], null, text)
        gone = (uniform >= 0.05) & (uniform < 0.15)
        image_latents = torch.where(gone[:, None, None, None], 0.0, image_latents)
        inputs = torch.cat([noisy, image_latents], dim=1)
        predicted = model.unet(inputs, timesteps, encoder_hidden_states=text).sample
        loss: Any = F.mse_loss(predicted.float(), target.float())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def _draw(self, like: Tensor) -> Drawn:
        normals = torch.randn(2, *like.shape, generator=self._generator, device=like.device)
        uniforms = torch.rand(2, len(like), generator=self._generator, device=like.device)
        return Drawn(normals[0], normals[1], uniforms[0], uniforms[1])
