"""Classifier-free guidance on denoised images, with a scale for every row of a batch."""

from __future__ import annotations

from torch import Tensor


def one_scale(unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
    """The prediction pushed `scale` times from unconditional to conditional, (row, ...).

    `scale` is (row,). Guidance on denoised images equals guidance on predicted noise.
    """
    return unconditional + per_row(scale, conditional) * (conditional - unconditional)


def two_scale(
    null: Tensor,
    image: Tensor,
    image_and_text: Tensor,
    *,
    image_scale: Tensor,
    text_scale: Tensor,
) -> Tensor:
    """The editor's prediction from three, (row, ...); both scales are (row,).

    `null` saw neither image nor instruction, `image` only the image, `image_and_text` both.
    Every scale means what the formula says, below 1 too.
    Source: InstructPix2Pix section 3.2.1, equation 3.
    """
    image_part = per_row(image_scale, null) * (image - null)
    text_part = per_row(text_scale, null) * (image_and_text - image)
    return null + image_part + text_part


def rescale(guided: Tensor, conditional: Tensor, amount: Tensor) -> Tensor:
    """`guided`, drawn back towards the contrast of `conditional`, (row, ...).

    `amount` (row,) is 0 for no change and 1 for the full standard deviation of `conditional`.
    Source: arXiv 2305.08891 section 3.4, here on denoised images.
    """
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (1 + per_row(amount, guided) * (ratio - 1))


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """`values` (row,) shaped to multiply `like` (row, ...), on its device and in its dtype."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))
