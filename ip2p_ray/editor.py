"""The product: an editor that changes a picture as a sentence tells it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args

import torch
from PIL import Image, ImageOps

from ip2p_ray.checkpoint import EDITOR_DEFAULTS, export_editor
from ip2p_ray.diffusion.guidance import rescale, two_scale
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.noise import Spacing, row_generators, row_noise
from ip2p_ray.diffusion.sample import Sampler, sample
from ip2p_ray.errors import ConfigError, ImageError, ModelError
from ip2p_ray.images import (
    decode_image,
    edit_size,
    fit_image,
    to_pil,
    to_tensor,
    to_uint8,
)
from ip2p_ray.settings import read_settings

SEED_LIMIT = 2**63


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """How a picture is edited; the defaults are the paper's, a model folder may bring its own."""

    steps: int = 100
    """Denoising steps, each three passes through the UNet."""
    text_guidance_scale: float = 7.5
    """How strongly the instruction is followed; the paper uses 5 to 10."""
    image_guidance_scale: float = 1.5
    """How strongly the source image is kept; the paper uses 1 to 1.5."""
    sampler: Sampler = "euler_ancestral"
    """Which of diffusion.sample's samplers."""
    resolution: int = 512
    """Pixels to which the longer side is brought; see images.edit_size."""
    max_pixels: int = 1024 * 1024
    """Pixels of the largest picture that is edited; larger ones are shrunk."""
    guidance_rescale: float = 0.0
    """0 for none, up to 1: draw the contrast back to that of the unguided prediction."""

    def __post_init__(self) -> None:
        for name in ("steps", "resolution", "max_pixels"):
            _check_integer(name, getattr(self, name), least=1)
        for name in ("text_guidance_scale", "image_guidance_scale"):
            _check_scale(name, getattr(self, name))
        if self.sampler not in get_args(Sampler):
            raise ConfigError(f"sampler is one of {get_args(Sampler)}, got {self.sampler!r}")
        _check_scale("guidance_rescale", self.guidance_rescale)
        if not 0 <= self.guidance_rescale <= 1:
            raise ConfigError(f"guidance_rescale lies in [0, 1], got {self.guidance_rescale!r}")


class Overrides(TypedDict, total=False):
    """What a call may state of EditSettings; None is as good as not stated."""

    steps: int | None
    sampler: Sampler | None
    resolution: int | None
    max_pixels: int | None
    guidance_rescale: float | None


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One picture to edit, with what may differ from its neighbours in a batch."""

    image: Image.Image | bytes
    """Any mode and orientation; or the encoded file."""
    instruction: str
    """What to change; an empty one changes nothing."""
    seed: int = 0
    """In [0, 2**63); of the initial noise and the steps' noise."""
    text_guidance_scale: float
    image_guidance_scale: float

    def __post_init__(self) -> None:
        if not isinstance(self.image, Image.Image | bytes):
            raise ConfigError(f"image is a PIL image or bytes, got {type(self.image).__name__}")
        if not isinstance(self.instruction, str):
            raise ConfigError(f"instruction is a text, got {self.instruction!r}")
        try:
            self.instruction.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"instruction is no Unicode text: {error.reason}") from error
        _check_integer("seed", self.seed, least=0)
        if self.seed >= SEED_LIMIT:
            raise ConfigError(f"seed lies in [0, 2**63), got {self.seed}")
        for name in ("text_guidance_scale", "image_guidance_scale"):
            _check_scale(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True, eq=False)
class Guidance:
    """What guides the rows of a batch."""

    null_text: torch.Tensor
    """Of the empty instruction, (1, token, channel)."""
    text: torch.Tensor
    """Of each row's instruction, (row, token, channel)."""
    image_latents: torch.Tensor
    """The source images', unscaled, float32 (row, channel, height, width)."""
    text_scale: torch.Tensor
    """(row,)."""
    image_scale: torch.Tensor
    """(row,)."""
    rescale: float = 0.0
    """`EditSettings.guidance_rescale`, of all rows."""


def guided(
    model: StableDiffusion, guidance: Guidance, x: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The clean latents behind x, of x's shape, by both guidances; `sigma` is (row,).

    Each row takes three of the UNet.
    """
    null = guidance.null_text.expand(x.shape[0], -1, -1)
    image = guidance.image_latents
    text = torch.cat([null, null, guidance.text])
    condition = torch.cat([torch.zeros_like(image), image, image])
    predictions = model.denoise(x.repeat(3, 1, 1, 1), sigma.repeat(3), text, condition)
    none, only_image, both = predictions.chunk(3)
    found = two_scale(
        none,
        only_image,
        both,
        image_scale=guidance.image_scale,
        text_scale=guidance.text_scale,
    )
    if not guidance.rescale:
        return found
    return rescale(found, both, torch.full((x.shape[0],), guidance.rescale))


class Editor:
    """Edits pictures with an InstructPix2Pix model.

    What a request returns depends on the request alone: every row has its own random stream. In
    a batch only the rounding of the arithmetic may differ, on float32 latents by less than 1e-4.
    """

    def __init__(
        self,
        model: StableDiffusion,
        *,
        settings: EditSettings | None = None,
        batch_size: int = 8,
    ) -> None:
        if not model.takes_image:
            raise ModelError(
                f"an editor's UNet takes {2 * model.latent_channels} channels (noisy latents and "
                f"the source image's), this one {model.unet.config['in_channels']}"
            )
        _check_integer("batch_size", batch_size, least=1)
        self.model, self.batch_size = model, batch_size
        self.settings = settings or EditSettings()
        """What is used for whatever a call does not state."""

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
    ) -> Editor:
        """The editor in a local diffusers folder or of a hub id, with the folder's own settings.

        Raises:
            ModelError: the folder is missing, broken, or not an editor's; it is named.
        """
        model = StableDiffusion.load(source, device=device, dtype=dtype)
        settings = _read_settings(Path(source) / EDITOR_DEFAULTS)
        return cls(model, settings=settings, batch_size=batch_size)

    def save(self, folder: str | Path) -> None:
        """A folder that `load` and diffusers' StableDiffusionInstructPix2PixPipeline read."""
        export_editor(self.model, None, folder, dataclasses.asdict(self.settings))

    def edit(
        self,
        image: Image.Image | bytes,
        instruction: str,
        *,
        seed: int = 0,
        text_guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        **settings: Unpack[Overrides],
    ) -> Image.Image:
        """The picture after the edit, RGB, at the size that `images.edit_size` gives.

        What is not stated comes from the editor's own settings. An empty instruction returns
        the resized picture. The same arguments return the same picture.

        Raises:
            ConfigError: an argument is outside what is allowed.
            ImageError: the image cannot be decoded.
        """
        return self.edit_batch(
            [image],
            [instruction],
            [seed],
            text_guidance_scale=text_guidance_scale,
            image_guidance_scale=image_guidance_scale,
            **settings,
        )[0]

    def edit_batch(
        self,
        images: Sequence[Image.Image | bytes],
        instructions: Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        text_guidance_scale: float | Sequence[float] | None = None,
        image_guidance_scale: float | Sequence[float] | None = None,
        **settings: Unpack[Overrides],
    ) -> list[Image.Image]:
        """As `edit` for many pictures; the two scales are one number, or one for each picture.

        Seeds are 0 by default. Pictures of one size are edited together, at most `batch_size` of
        them at a time.
        """
        common = self._settings(settings)
        columns = {
            "image": images,
            "instruction": instructions,
            "seed": seeds,
            "text_guidance_scale": text_guidance_scale,
            "image_guidance_scale": image_guidance_scale,
        }
        requests = _requests(columns, common)
        pictures = [self.prepare(request.image, common) for request in requests]
        results = list(pictures)
        for rows in _batches(requests, pictures, self.batch_size):
            latents = self.edit_latents(
                [pictures[row] for row in rows], [requests[row] for row in rows], common
            )
            for row, picture in zip(rows, self.decode(latents), strict=True):
                results[row] = picture
        return results

    def prepare(self, image: Image.Image | bytes, settings: EditSettings) -> Image.Image:
        """The picture that is edited: upright RGB at its edit size."""
        upright = upright_rgb(image)
        size = edit_size(
            upright.width,
            upright.height,
            resolution=settings.resolution,
            multiple=self.size_multiple,
            max_pixels=settings.max_pixels,
        )
        return fit_image(upright, size)

    @property
    def size_multiple(self) -> int:
        """Sides are multiples of this: the pixels behind one place of the UNet's lowest level."""
        vae_levels = len(self.model.vae.config["block_out_channels"])
        unet_levels = len(self.model.unet.config["block_out_channels"])
        return int(2 ** (vae_levels - 1) * 2 ** (unet_levels - 1))

    @torch.inference_mode()
    def edit_latents(
        self,
        pictures: Sequence[Image.Image],
        requests: Sequence[EditRequest],
        settings: EditSettings,
    ) -> torch.Tensor:
        """The edited pictures' scaled latents, float32 (row, channel, height, width).

        `pictures` are RGB and of one size, which is not changed any more; the requests' own
        images are not looked at. Noise is drawn in diffusers' order: the initial noise first,
        then one draw a step, from one CPU generator a row.

        Source: equation 3 of the paper; parity with StableDiffusionInstructPix2PixPipeline is
        tested, which however drops all guidance at image_guidance_scale < 1.
        """
        model, device = self.model, self.model.device
        generators = row_generators([request.seed for request in requests])
        images = torch.stack([to_tensor(picture) for picture in pictures])
        image_latents, _ = model.encode_image(images)
        sigmas = self.sigmas(settings.steps).to(device)
        x = row_noise(generators, image_latents.shape[1:]).to(device) * sigmas[0]
        texts = model.encode_text(["", *(request.instruction for request in requests)])
        guidance = Guidance(
            null_text=texts[:1],
            text=texts[1:],
            image_latents=image_latents,
            text_scale=torch.tensor([float(each.text_guidance_scale) for each in requests]),
            image_scale=torch.tensor([float(each.image_guidance_scale) for each in requests]),
            rescale=settings.guidance_rescale,
        )
        return sample(
            partial(guided, model, guidance),
            x,
            sigmas,
            sampler=settings.sampler,
            generators=generators,
        )

    def sigmas(self, steps: int) -> torch.Tensor:
        """The noise levels of so many steps, float32 (steps + 1,), spaced as the model wants."""
        trailing = self.model.scheduler_config.get("timestep_spacing") == "trailing"
        spacing: Spacing = "trailing" if trailing else "linspace"
        return self.model.schedule.sigmas(steps, spacing=spacing)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """The pictures of scaled latents (row, channel, height, width)."""
        return [to_pil(array) for array in to_uint8(self.model.decode(latents))]

    def _settings(self, changes: Overrides) -> EditSettings:
        unknown = [name for name in changes if name not in Overrides.__annotations__]
        if unknown:
            known = ", ".join(Overrides.__annotations__)
            raise ConfigError(f"no such setting {unknown[0]!r}; there are {known}")
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self.settings, **given)  # type: ignore[arg-type]


def _requests(columns: Mapping[str, Any], settings: EditSettings) -> list[EditRequest]:
    """One request a picture; a column is a sequence as long, or one value for all, or None."""
    count = len(columns["image"])
    defaults = {
        "seed": 0,
        "text_guidance_scale": settings.text_guidance_scale,
        "image_guidance_scale": settings.image_guidance_scale,
    }
    filled = {}
    for name, values in columns.items():
        if values is None or isinstance(values, Real | str):
            filled[name] = [defaults.get(name) if values is None else values] * count
        elif len(values) != count:
            raise ConfigError(f"{count} images but {len(values)} values of {name}")
        else:
            filled[name] = list(values)
    rows = zip(*filled.values(), strict=True)
    return [EditRequest(**dict(zip(filled, row, strict=True))) for row in rows]


def _batches(
    requests: Sequence[EditRequest], pictures: Sequence[Image.Image], batch_size: int
) -> list[list[int]]:
    """The rows to edit, in groups of one picture size; an empty instruction needs no editing."""
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, (request, picture) in enumerate(zip(requests, pictures, strict=True)):
        if request.instruction.strip():
            by_size[picture.size].append(row)
    return [
        rows[start : start + batch_size]
        for rows in by_size.values()
        for start in range(0, len(rows), batch_size)
    ]


def upright_rgb(image: Image.Image | bytes) -> Image.Image:
    """8-bit RGB, EXIF orientation applied, transparency on white, by the rules of decode_image."""
    if isinstance(image, bytes):
        return decode_image(image)
    if 0 in image.size:
        raise ImageError(f"image has no pixels: {image.width} x {image.height}")
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "La":
        upright = upright.convert("LA")
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
    elif upright.mode not in ("I", "I;16", "I;16B", "I;16L", "F"):
        return upright.convert("RGB")
    stored = io.BytesIO()
    upright.save(stored, "TIFF")
    return decode_image(stored.getvalue())


def _read_settings(path: Path) -> EditSettings:
    return read_settings(EditSettings, path) if path.exists() else EditSettings()


def _check_integer(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ConfigError(f"{name} is a whole number of at least {least}, got {value!r}")


def _check_scale(name: str, value: object) -> None:
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, Real):
        with contextlib.suppress(OverflowError):  # a whole number that no float can hold
            number = float(value)
    if not math.isfinite(number):
        raise ConfigError(f"{name} is a finite number, got {value!r}")
