"""A user's own pairs: each row checked, its keys, its pictures as they are stored, its split.

Of a row is asked that both pictures decode (broken and cut ones do not; more than
`images.MAX_PIXELS` are refused by the header), that they are of one size after EXIF orientation,
not too small, that there is an instruction, and that a seed that came along is an integer. Captions
may be missing. Keys come from the pictures' pixels, not from their files.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from ip2p_ray.captions import one_line
from ip2p_ray.errors import ConfigError, DatasetError, ImageError, LargeImageError
from ip2p_ray.files import File
from ip2p_ray.images import decode_image, decode_stored, encode_png, fit_image
from ip2p_ray.layouts import Given
from ip2p_ray.schema import (
    SIMILARITIES,
    own_pair_key,
    own_triplet_key,
    split_of,
    triplet_key,
)

UNREADABLE = "unreadable_row"
EMPTY_INSTRUCTION = "empty_instruction"
NOT_TEXT = "not_text"
BAD_SEED = "bad_seed"
MISSING = "image_missing"
BROKEN = "image_broken"
TOO_LARGE = "image_too_large"
SIZES_DIFFER = "sizes_differ"
TOO_SMALL = "image_too_small"
DUPLICATE = "duplicate_pair"

REASONS = (
    UNREADABLE,
    EMPTY_INSTRUCTION,
    NOT_TEXT,
    BAD_SEED,
    MISSING,
    TOO_LARGE,
    BROKEN,
    SIZES_DIFFER,
    TOO_SMALL,
    DUPLICATE,
)
"""Every reason, in the order in which they are looked for."""

UNUSABLE = tuple(reason for reason in REASONS if reason != DUPLICATE)
"""Those that say that something is wrong with the data."""

MAX_BYTES = 256 << 20
"""Of a picture's file."""

_DRAWS = ("self_replace", "guidance_scale")
_DETAIL = 300
_MOST = 2.0**128 - 2.0**104  # the largest float32, in which numbers are stored

Pictures = tuple[Image.Image, Image.Image]


@dataclass(frozen=True, kw_only=True)
class OwnPairsConfig:
    """Which pictures are taken, and how they are stored."""

    min_side: int = 64
    """Pixels of the shorter side, at least."""
    resolution: int | None = None
    """Pictures are brought to this height and width, cut equally on both sides where they are not
    square, and stored as PNG; None leaves them as they are."""

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise ConfigError(f"min_side is at least 1, got {self.min_side}")
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise ConfigError(f"resolution is a multiple of 8, got {self.resolution}")


def check(given: Given, config: OwnPairsConfig) -> tuple[dict[str, Any], Pictures | None]:
    """What is known of the row, with the reason to drop it; and its pictures unless it is dropped.

    The pictures are RGB, upright and of the size in which they came.
    """
    row: dict[str, Any] = {name: _draw(given.made_with.get(name)) for name in _DRAWS}
    row |= {name: _similarity(given.made_with.get(name)) for name in SIMILARITIES}
    row |= {"seed": _seed(given.made_with.get("seed"))}
    row |= {"place": given.place, "group": given.group, "reason": None, "detail": None}
    row |= {"caption": _text(given.caption), "edited_caption": _text(given.edited_caption)}
    row["instruction"] = _text(given.instruction)
    if given.unread is not None:
        return _dropped(row, UNREADABLE, given.unread)
    if row["instruction"] is None:
        empty = given.instruction is None or isinstance(given.instruction, str)
        return _dropped(row, EMPTY_INSTRUCTION if empty else NOT_TEXT, repr(given.instruction))
    if row["seed"] is None and given.made_with.get("seed") is not None:
        told = f"{given.made_with['seed']!r} is no integer of 64 bits"
        return _dropped(row, BAD_SEED, told)
    pictures = []
    for name, picture in (("source", given.source), ("edited", given.edited)):
        try:
            pictures.append(decode_image(_bytes(picture)))
        except _Missing as error:
            return _dropped(row, MISSING, f"{name}: {error}")
        except LargeImageError as error:
            return _dropped(row, TOO_LARGE, f"{name}: {error}")
        except ImageError as error:
            return _dropped(row, BROKEN, f"{name}: {error}")
    source, edited = pictures
    row |= {"width": source.width, "height": source.height}
    if source.size != edited.size:
        sizes = " and ".join(f"{image.width} x {image.height}" for image in pictures)
        return _dropped(row, SIZES_DIFFER, f"{sizes} (source and edited)")
    if min(source.size) < config.min_side:
        return _dropped(row, TOO_SMALL, f"{source.width} x {source.height}")
    row |= {"source_digest": pixel_digest(source), "edited_digest": pixel_digest(edited)}
    row |= _keys(row)
    return row, (source, edited)


def stored_picture(
    picture: bytes | File | None, *, digest: str, config: OwnPairsConfig
) -> dict[str, Any]:
    """The picture of a row that was checked, as `schema.IMAGE`: unchanged where it may be.

    `digest` is the `pixel_digest` that it had then.

    Raises:
        ImageError: it cannot be read any more, or is another picture now.
    """
    try:
        data = _bytes(picture)
    except _Missing as error:
        raise ImageError(str(error)) from error
    image, plain = decode_stored(data)
    if pixel_digest(image) != digest:
        raise ImageError("it is another picture now")
    small = fitted(image, config)
    if not plain or small is not image:
        data = encode_png(small)
    return {"bytes": data, "path": None}


def fitted(image: Image.Image, config: OwnPairsConfig) -> Image.Image:
    """The picture in the size in which it is stored."""
    size = config.resolution
    if size is None or image.size == (size, size):
        return image
    return fit_image(image, (size, size))


def pixel_digest(image: Image.Image) -> str:
    """32 hex digits of an RGB image's size and pixels."""
    digest = hashlib.blake2b(f"{image.width}x{image.height}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


class Groups:
    """Things that belong together, by names in any order: who shares a name is in one group."""

    def __init__(self) -> None:
        self._above: dict[bytes, bytes] = {}

    def join(self, names: Iterable[str]) -> None:
        """These are in one group, with all that each was in a group with before."""
        roots = {self._root(_name(name)) for name in names}
        least = min(roots)  # so that the order of joining does not matter
        for root in roots:
            self._above[root] = least

    def of(self, name: str) -> str:
        """What the whole group is called."""
        return self._root(_name(name)).hex()

    def split(self, name: str, held_out: float) -> Literal["train", "held_out"]:
        """The split of the whole group."""
        return split_of(self.of(name), held_out)

    def _root(self, name: bytes) -> bytes:
        above = self._above.setdefault(name, name)
        while above != name:
            self._above[name] = self._above[above]
            name, above = above, self._above[above]
        return name


class _Missing(Exception):  # noqa: N818 - never leaves this module
    """There is no picture."""


def _bytes(picture: bytes | File | None) -> bytes:
    if picture is None:
        raise _Missing("there is none")
    if isinstance(picture, bytes):
        return picture
    try:
        with picture.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            data = file.read() if size <= MAX_BYTES else b""
    except DatasetError as error:  # there is no such object
        raise _Missing(str(error)) from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _Missing(f"{picture} cannot be read: {error}") from error
    if size > MAX_BYTES:
        raise LargeImageError(f"{picture} has {size:,} bytes, at most {MAX_BYTES:,} are accepted")
    return data


def _keys(row: dict[str, Any]) -> dict[str, str]:
    texts = (row["caption"], row["instruction"], row["edited_caption"])
    source, instruction = row["source_digest"], row["instruction"]
    return {
        "pair_key": own_pair_key(source, instruction, row["edited_digest"]),
        "triplet_key": own_triplet_key(source, instruction)
        if None in texts
        else triplet_key(*texts),
    }


def _dropped(row: dict[str, Any], reason: str, detail: str) -> tuple[dict[str, Any], None]:
    return row | {"reason": reason, "detail": detail[:_DETAIL]}, None


def _text(value: Any) -> str | None:
    """The text on one line; None for what is empty or no text."""
    return one_line(value) or None if isinstance(value, str) else None


def _seed(value: Any) -> int | None:
    """An integer as its column holds it; None for what is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    known = isinstance(value, int) and not isinstance(value, bool)
    return value if known and -(2**63) <= value < 2**63 else None


def _draw(value: Any) -> float | None:
    """A number as its column holds it; None for what is none."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and -_MOST <= value <= _MOST else None


def _similarity(value: Any) -> float | None:
    """The same, but not a number for what is none: it is there, and reaches no threshold."""
    number = _draw(value)
    return math.nan if number is None and value is not None else number


def _name(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
