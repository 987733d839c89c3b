"""What an editor makes of a few pictures while it is trained: one PNG, a line a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor
from ip2p_ray.images import to_pil, to_uint8

_EDGE, _TEXT = 4, 14


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A pair that is shown."""

    instruction: str
    source: Image.Image
    edited: Image.Image
    """What the data has."""


@torch.inference_mode()
def decoded(model: StableDiffusion, latents: torch.Tensor) -> list[Image.Image]:
    """The pictures of unscaled latents (row, channel, height, width)."""
    images = model.decode(latents.to(model.device) * model.scaling_factor)
    return [to_pil(array) for array in to_uint8(images)]


def preview(editor: Editor, shown: Sequence[Shown]) -> Image.Image:
    """A picture with a line for each: the source, what the editor makes of it, what the data has.

    The editor's seeds are 0, 1, ..., so that previews differ by the weights only.
    """
    width, height = shown[0].source.size
    settings = editor.settings
    made = editor.edit_batch(
        [each.source for each in shown],
        [each.instruction for each in shown],
        list(range(len(shown))),
        resolution=max(width, height),
        steps=settings.steps,
    )
    line = height + _TEXT + _EDGE
    page = Image.new("RGB", (3 * (width + _EDGE) + _EDGE, len(shown) * line + _EDGE), "white")
    draw = ImageDraw.Draw(page)
    for number, (each, picture) in enumerate(zip(shown, made, strict=True)):
        top = number * line + _EDGE
        words = each.instruction.encode("ascii", "replace").decode()
        draw.text((_EDGE, top), words, fill="black")
        for column, image in enumerate((each.source, picture, each.edited)):
            place = (_EDGE + column * (width + _EDGE), top + _TEXT)
            page.paste(image.resize((width, height)), place)
    return page
