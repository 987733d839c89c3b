"""From a request to a row that can take its first step."""

from __future__ import annotations

import hashlib
import io

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ip2p_ray.diffusion.noise import row_generators, row_noise
from ip2p_ray.diffusion.sample import Progress
from ip2p_ray.editor import Editor, upright_rgb
from ip2p_ray.engine.observer import Observer
from ip2p_ray.engine.recent import Recent
from ip2p_ray.engine.request import Ticket
from ip2p_ray.engine.row import Row, latent_mask
from ip2p_ray.errors import ConfigError, ImageError
from ip2p_ray.images import UNREADABLE, edit_size, fit_image, to_tensor


class Preparation:
    """Makes rows; texts and images that were met lately are not encoded again.

    Each text and each image is encoded alone, so that what is kept does not depend on which
    other requests there were.
    """

    def __init__(self, editor: Editor, observer: Observer, *, cache_bytes: int) -> None:
        self._editor, self._observer = editor, observer
        self._texts, self._images = Recent(cache_bytes), Recent(cache_bytes)

    @torch.inference_mode()
    def text(self, instruction: str) -> torch.Tensor:
        """What cross-attention reads of an instruction, (1, token, channel)."""
        model = self._editor.model
        found, kept = self._texts.get(instruction, lambda: model.encode_text([instruction]))
        self._observer.looked_up("text", kept)
        return found

    @torch.inference_mode()
    def row(self, ticket: Ticket) -> Row:
        """The row of a request.

        Raises:
            ImageError: its image or its mask cannot be used.
            ConfigError: its size is not one the model edits.
        """
        editor, request = self._editor, ticket.request
        model, settings = editor.model, editor.settings
        upright = upright_rgb(request.image)
        size = request.size or edit_size(
            upright.width,
            upright.height,
            resolution=settings.resolution,
            multiple=editor.size_multiple,
            max_pixels=settings.max_pixels,
        )
        check_size(editor, size)
        mask = None if request.mask is None else read_mask(request.mask, upright.size)
        picture = fit_image(upright, size)
        image_latents = self._image_latents(picture)
        generator = row_generators([request.seed])[0]
        sigmas = editor.sigmas(request.steps)
        noise = row_noise([generator], image_latents.shape[1:]).to(model.device)
        if mask is not None:
            mask = fit_image(mask, size).point(_BINARY)
        return Row(
            ticket=ticket,
            picture=picture,
            mask=mask,
            text=self.text(request.instruction),
            image_latents=image_latents,
            editable=None
            if mask is None
            else latent_mask(mask, model.latent_size(size[1], size[0])).to(model.device),
            sigmas=sigmas,
            generator=generator,
            progress=Progress.begin(noise * sigmas[0].item()),
            cost=max(1.0, size[0] * size[1] / settings.resolution**2),
        )

    def _image_latents(self, picture: Image.Image) -> torch.Tensor:
        data = picture.tobytes()
        key = picture.size, hashlib.blake2b(data, digest_size=16).digest()
        model = self._editor.model
        found, kept = self._images.get(
            key, lambda: model.encode_image(to_tensor(picture)[None])[0].clone()
        )
        self._observer.looked_up("image", kept)
        return found


def check_size(editor: Editor, size: tuple[int, int]) -> None:
    """Raises: ConfigError unless the editor edits pictures of this (width, height)."""
    multiple, most = editor.size_multiple, editor.settings.max_pixels
    if any(side < multiple or side % multiple for side in size):
        raise ConfigError(
            f"size is width x height, each a multiple of {multiple}, got {size[0]}x{size[1]}"
        )
    if size[0] * size[1] > most:
        raise ConfigError(
            f"size is at most {most} pixels, got {size[0]}x{size[1]} = {size[0] * size[1]}"
        )


def read_mask(mask: Image.Image | bytes, size: tuple[int, int]) -> Image.Image:
    """Mode L, upright, of the source's size, 255 where the mask is transparent.

    Raises:
        ImageError: it cannot be decoded, has no transparency, or another size than the source.
    """
    if not isinstance(mask, bytes):
        return _transparent(mask, size)
    try:
        with Image.open(io.BytesIO(mask), formats=("PNG", "WEBP")) as opened:
            # before a pixel is decoded; orientation may swap the sides
            if sorted(opened.size) != sorted(size):
                raise ImageError(_other_size(opened.size, size))
            opened.load()
            return _transparent(opened, size)
    except ImageError:
        raise
    except (*UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        cause = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(
            f"mask cannot be decoded ({cause}); send a PNG that is transparent where to edit"
        ) from error


def _transparent(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    upright = ImageOps.exif_transpose(mask)
    if upright.size != size:
        raise ImageError(_other_size(upright.size, size))
    if not upright.has_transparency_data:
        raise ImageError("mask has no transparency; it is transparent where to edit")
    if upright.mode.startswith(("I", "F")):
        raise ImageError("mask has more than 8 bits a channel; save it with 8")
    return upright.convert("RGBA").getchannel("A").point(_TRANSPARENT)


def _other_size(found: tuple[int, int], wanted: tuple[int, int]) -> str:
    return f"mask has {found[0]} x {found[1]} pixels, the image {wanted[0]} x {wanted[1]}"


_TRANSPARENT = [255 if alpha < 128 else 0 for alpha in range(256)]
_BINARY = [255 if level >= 128 else 0 for level in range(256)]
