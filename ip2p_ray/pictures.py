"""Pairs as pictures, cut anew at every visit: what training reads where nothing was encoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from ip2p_ray.errors import DatasetError, ImageError
from ip2p_ray.images import decode_image
from ip2p_ray.mapped import MappedRows, Paths
from ip2p_ray.schema import PAIRS
from ip2p_ray.training.feed import Crop, PictureRow

_COLUMNS = ("pair_key", "triplet_key", "split", "instruction", "source_image", "edited_image")

ENLARGED = 1 / 8
"""Share by which a picture is at most enlarged before it is cut: 256 to 288 pixels."""


class PictureDataset(MappedRows):
    """Pairs by triplet group. Satisfies `training.feed.Pictures`.

    Source: the paper's App. A.3: resized to U{256..288}, cut to 256 at random, mirrored.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        resolution: int,
        shape: tuple[int, int, int],
        cache: Path | None = None,
    ) -> None:
        """Opens shards of `schema.PAIRS`, as `mapped.MappedRows` does.

        Pictures are cut to `resolution` pixels on both sides; `shape` is what the autoencoder
        makes of one, (channel, height, width).
        """
        schema = pa.schema([PAIRS.field(name) for name in _COLUMNS])
        super().__init__(paths, schema, name="pairs", cache=cache, rows_at_a_time=32)
        self.resolution, self.shape = resolution, shape

    def read_pictures(self, index: int, *, pick: float, flip: bool, crop: Crop) -> PictureRow:
        """One pair of a group: number floor(pick x pairs in it), resized, cut and mirrored.

        Raises:
            DatasetError: a picture is broken.
        """
        row = self.row(index, pick)
        source, edited = (
            self._cut(self._picture(name, row), crop, flip=flip)
            for name in ("source_image", "edited_image")
        )
        return PictureRow(self.value("instruction", row).as_py(), source, edited)

    def _picture(self, name: str, row: int) -> Image.Image:
        try:
            return decode_image(self.value(name, row)["bytes"].as_py())
        except ImageError as error:
            key = self.value("pair_key", row).as_py()
            raise DatasetError(f"{name} of pair {key}: {error}") from error

    def _cut(self, picture: Image.Image, crop: Crop, *, flip: bool) -> np.ndarray:
        side = self.resolution
        short = side + int(crop.size * (int(side * ENLARGED) + 1))
        scale = short / min(picture.size)
        size = tuple(max(side, round(length * scale)) for length in picture.size)
        if picture.size != size:
            picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        left = int(crop.left * (size[0] - side + 1))
        top = int(crop.top * (size[1] - side + 1))
        array = np.asarray(picture)[top : top + side, left : left + side]
        return np.ascontiguousarray(array[:, ::-1] if flip else array)
