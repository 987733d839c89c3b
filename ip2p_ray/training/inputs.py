"""What the UNet is given, on its device, made of a micro-batch as it was read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.training.dropout import (
    NULL_INSTRUCTION,
    drop_embeddings,
    drop_images,
    drop_instructions,
    dropout_masks,
)
from ip2p_ray.training.feed import Batch, PictureBatch, Text
from ip2p_ray.training.loss import edited_latents
from ip2p_ray.training.text import TextCache

ENCODED = 8
"""Pictures that the autoencoder takes at a time: it needs far more memory for one than the UNet."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Of one micro-batch; all but the last are float32, `row` is the leading axis."""

    latents: torch.Tensor
    """(row, channel, height, width): a sample of the edited image's posterior, scaled."""
    image_latents: torch.Tensor
    """The same shape: the source's mode, unscaled, zeros where it was dropped."""
    text: torch.Tensor
    """(row, token, channel)"""
    noise: torch.Tensor
    """The latents' shape."""
    timesteps: torch.Tensor
    """int64 (row,)"""


class InputMaker:
    """Makes Inputs with a model's autoencoder and text encoder, which stay as they are."""

    def __init__(self, model: StableDiffusion, device: torch.device) -> None:
        self._model, self._device = model, device
        self._null_tokens: tuple[int, ...] = tuple(model.tokens([NULL_INSTRUCTION])[0].tolist())
        self._texts = TextCache(model.encode_text)
        self._tokens = TextCache(self._encode_tokens, null=self._null_tokens)

    def __call__(self, batch: Batch | PictureBatch, dropout: float) -> Inputs:
        """The inputs; `dropout` is the rate of `dropout_masks`, 0 drops nothing."""
        text_dropped, image_dropped = dropout_masks(batch.dropout, dropout)
        mean, std, mode = self._encoded(batch)
        count = len(self._model.schedule.alphas_cumprod)
        return Inputs(
            latents=edited_latents(
                mean, std, self._there(batch.posterior_noise), self._model.scaling_factor
            ),
            image_latents=drop_images(mode, image_dropped),
            text=self._text(batch, text_dropped),
            noise=self._there(batch.noise),
            timesteps=(batch.timesteps * count).long().to(self._device),
        )

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":  # copied beside the work on the device, not after it
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)

    def _text(self, batch: Batch | PictureBatch, dropped: torch.Tensor) -> torch.Tensor:
        if isinstance(batch, Batch) and batch.embeddings is not None:
            null = self._texts([NULL_INSTRUCTION]).half()  # as coarse as the stored ones
            return drop_embeddings(self._there(batch.embeddings), dropped, null)
        texts: list[Text] = list(batch.instructions)
        if isinstance(texts[0], tuple):
            rows = self._tokens(drop_instructions(texts, dropped, self._null_tokens))
        else:
            rows = self._texts(drop_instructions(texts, dropped))
        return rows.to(self._device, torch.float32)

    def _encode_tokens(self, rows: list[tuple[int, ...]]) -> torch.Tensor:
        return self._model.encode_tokens(torch.tensor(rows))

    @torch.no_grad()
    def _encoded(
        self, batch: Batch | PictureBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the edited image's posterior, mode of the source's."""
        if isinstance(batch, Batch):
            found = (batch.edited_mean, batch.edited_std, batch.source_mode)
            mean, std, mode = map(self._there, found)
            return mean, std, mode
        edited, source = (self._encode(images) for images in (batch.edited, batch.source))
        return *edited, source[0]

    def _encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            self._model.encode_image(self._there(part).permute(0, 3, 1, 2).float() / 127.5 - 1.0)
            for part in torch.split(images, ENCODED)
        ]
        means, stds = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(stds)
