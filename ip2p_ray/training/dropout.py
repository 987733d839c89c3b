"""Conditioning dropout: some samples learn without the instruction, the source image, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

Text = TypeVar("Text")

NULL_INSTRUCTION = ""


def dropout_masks(uniforms: torch.Tensor, rate: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows lose their instruction and which their source image: two bool tensors (row,).

    One uniform draw r in [0, 1) a row decides both: the text goes if r < 2 rate, the image if
    rate <= r < 3 rate. Hence text only, both, and image only have probability `rate` each.

    Source: METHOD section 4, the paper's 5 %.
    """
    if not 0 <= rate <= 1 / 3:
        raise ValueError(f"dropout rate must lie in [0, 1/3], got {rate}")
    text = uniforms < 2 * rate
    image = (uniforms >= rate) & (uniforms < 3 * rate)
    return text, image


def drop_instructions(
    instructions: Sequence[Text], dropped: torch.Tensor, null: Text | str = NULL_INSTRUCTION
) -> list[Text]:
    """The instructions with the empty one in place of each dropped row; dropped is bool (row,).

    They are texts, or token numbers if `null` is.
    """
    if len(instructions) != len(dropped):
        raise ValueError(f"{len(instructions)} instructions but {len(dropped)} rows of the mask")
    empty: Any = null
    return [
        empty if gone else text for text, gone in zip(instructions, dropped.tolist(), strict=True)
    ]


def drop_embeddings(
    embeddings: torch.Tensor, dropped: torch.Tensor, null: torch.Tensor
) -> torch.Tensor:
    """The embeddings (row, token, channel) with that of the empty text in dropped rows."""
    gone = dropped.to(embeddings.device)[:, None, None]
    return torch.where(gone, null.to(embeddings), embeddings)


def drop_images(image_latents: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """The source latents (row, channel, height, width) with dropped rows all zeros.

    The null image is the zero latent, not an encoded black picture.
    """
    gone = dropped.to(image_latents.device)[:, None, None, None]
    return image_latents.masked_fill(gone, 0.0)
