"""Images as encoded bytes, as PIL images, as arrays and as tensors, and the one resize rule.

bytes --decode_image--> PIL RGB --fit_image--> PIL of an edit_size --to_tensor--> (3, h, w)
bytes <--encode_image-- PIL RGB <--to_pil----- uint8 array <------to_uint8------ (b, 3, h, w)
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ip2p_ray.errors import ConfigError, ImageError, LargeImageError

MAX_PIXELS = 50_000_000
"""Pixels of the largest image that is decoded by default (150 MB as RGB)."""

# Formats that people upload. A list, because Pillow hands some others to outside programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    *(IndexError, KeyError, TypeError, AttributeError, OverflowError, ZeroDivisionError),
    *(RuntimeError, MemoryError),
)
"""What Pillow raises on files that are broken, depending on where."""

UINT8 = npt.NDArray[np.uint8]

ImageFormat = Literal["png", "jpeg"]
"""How pictures are stored."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An 8-bit RGB image, upright, from the encoded bytes of an image of any mode.

    EXIF orientation is applied, transparency is laid on white, 16-bit values are scaled to 8 bits,
    and of an animation the first frame is taken. Colour profiles are not applied.

    Raises:
        LargeImageError: more than `max_pixels` by its header, before any pixel is decoded.
        ImageError: not an image in one of FORMATS, cut short or broken, or of floating-point
            values.
    """
    return decode_stored(data, max_pixels=max_pixels)[0]


def decode_stored(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, bool]:
    """What `decode_image` makes of the bytes, and whether they may be stored as they are.

    That is so of JPEG and PNG files of upright RGB without transparency: whatever reads them
    finds the same pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            check_pixels(image, max_pixels)
            image.load()
            plain = image.format in ("JPEG", "PNG") and image.mode == "RGB"
            plain = plain and not image.has_transparency_data
            plain = plain and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            return _rgb(ImageOps.exif_transpose(image)), plain
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LargeImageError(far_too_large(max_pixels)) from error
    except UNREADABLE as error:
        cause = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(
            f"{len(data)} bytes cannot be decoded as an image ({cause}); "
            f"send a whole file in one of {', '.join(FORMATS)}"
        ) from error


def encode_png(image: Image.Image, *, level: int = 6) -> bytes:
    """The image as PNG, without loss and without metadata; `level`, in [0, 9], packs it closer."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=level)
    return stream.getvalue()


def encode_image(image: Image.Image, image_format: ImageFormat) -> bytes:
    """The image as PNG, or as JPEG of quality 95 whose colours have every pixel of their own."""
    if image_format == "png":
        return encode_png(image)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def to_tensor(image: Image.Image) -> torch.Tensor:
    """float32 (3, height, width) in [-1, 1] of an RGB image."""
    array = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> UINT8:
    """uint8 (batch, height, width, 3) of float (batch, 3, height, width) in [-1, 1].

    Rounded to the nearest value, after clamping what lies outside.
    """
    levels = ((images.detach().float() + 1.0) * 127.5).round().clamp(0.0, 255.0)
    array: UINT8 = levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def to_pil(array: UINT8) -> Image.Image:
    """The RGB image of a uint8 (height, width, 3) array."""
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def edit_size(
    width: int, height: int, *, resolution: int, multiple: int = 8, max_pixels: int
) -> tuple[int, int]:
    """The (width, height) at which an image is edited; both are multiples of `multiple`.

    The longer side is brought to about `resolution`, then the shorter is rounded up and the longer
    follows, rounded down. `resolution` is no cap (500x333 gives 576x384 at multiple 64), so the
    result is shrunk until it has at most `max_pixels`.

    Raises:
        ConfigError: a value is not positive, or `max_pixels` has no room for the smallest size.

    Source: IP2P edit_cli.py with multiple=64, in whole numbers and hence free of its rounding
    errors; the cap is ours.
    """
    if min(width, height, resolution, multiple) < 1:
        raise ConfigError(
            "width, height, resolution and multiple are at least 1, "
            f"got {width}, {height}, {resolution}, {multiple}"
        )
    if max_pixels < multiple * multiple:
        raise ConfigError(f"max_pixels is at least {multiple * multiple}, got {max_pixels}")
    long, short = max(width, height), min(width, height)
    new_short = -(-short * resolution // (long * multiple)) * multiple
    new_long = long * new_short // (short * multiple) * multiple
    if new_long * new_short > max_pixels:
        long, short = new_long, new_short
        new_short = max(math.isqrt(max_pixels * short // long) // multiple, 1) * multiple
        new_long = min(math.isqrt(max_pixels * long // short), max_pixels // new_short)
        new_long = new_long // multiple * multiple
    return (new_long, new_short) if width >= height else (new_short, new_long)


def fit_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at exactly (width, height): LANCZOS, cut equally on both sides where it must."""
    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def far_too_large(max_pixels: int) -> str:
    """What is said of an image that Pillow does not even open."""
    return f"the image has far too many pixels: at most {max_pixels} are accepted"


def check_pixels(image: Image.Image, max_pixels: int = MAX_PIXELS) -> None:
    """Raises: LargeImageError for an image, decoded or only opened, of more pixels."""
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise LargeImageError(
            f"the image has {image.width} x {image.height} = {pixels} pixels, "
            f"at most {max_pixels} are accepted; send a smaller one"
        )


def _rgb(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode, transparency laid on white."""
    if image.mode == "F":
        raise ImageError("an image of floating-point values has no agreed range; save it as 8-bit")
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image)).convert("RGB")
    if image.has_transparency_data:
        return Image.alpha_composite(
            Image.new("RGBA", image.size, "white"), image.convert("RGBA")
        ).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(values: npt.NDArray[Any]) -> Image.Image:
    levels = np.clip(values.astype(np.float64), 0.0, 65535.0) / 257.0
    return Image.fromarray(np.rint(levels).astype(np.uint8))
