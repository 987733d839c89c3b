"""Encoded pairs: what the autoencoder makes of the images, once, so that training never runs it.

encode_pairs makes the columns of `schema.LATENTS`; LatentDataset reads them back by index from
memory-mapped files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError, DatasetError, ModelError
from ip2p_ray.mapped import MappedRows, Paths
from ip2p_ray.schema import LATENT_TEXTS, LATENTS
from ip2p_ray.training.feed import FLOAT16, LatentRow

ARRAYS = ("edited_mean", "edited_std", "source_mode")
FLIPPED = "_flipped"
UINT8 = npt.NDArray[np.uint8]
TextForm = Literal["instruction", "tokens", "embeddings"]
"""What of the instruction is stored beside it: nothing, its token numbers, or what the text encoder
makes of them (float16), so that training runs it for the empty text only."""


@torch.inference_mode()
def encode_pairs(model: StableDiffusion, source: UINT8, edited: UINT8) -> list[dict[str, Any]]:
    """The array columns of `schema.LATENTS`, a dict a pair: "shape" and six float16 byte strings.

    source and edited are uint8 RGB (pair, height, width, 3). Of the edited image the mean and the
    standard deviation of the posterior are kept, so that training samples it anew at every visit;
    of the source the mode. All unscaled. The mirrored pair is encoded too, because the encoder
    does not commute with mirroring. The keys, the instruction and the split are the caller's.

    Raises:
        ConfigError: the arrays are not two equal batches of RGB images.
        ModelError: the autoencoder returned something that float16 cannot hold.
    """
    if source.shape != edited.shape or source.ndim != 4 or source.shape[-1] != 3:
        raise ConfigError(
            "source and edited must both be (pair, height, width, 3), "
            f"got {source.shape} and {edited.shape}"
        )
    plain = _encode(model, source, edited)
    mirrored = _encode(model, source[:, :, ::-1], edited[:, :, ::-1])
    arrays = plain | {f"{name}{FLIPPED}": array for name, array in mirrored.items()}
    shape = list(plain["edited_mean"].shape[1:])
    return [
        {"shape": shape, **{name: array[row].tobytes() for name, array in arrays.items()}}
        for row in range(len(source))
    ]


@torch.inference_mode()
def encode_instructions(
    model: StableDiffusion, instructions: Sequence[str], form: TextForm
) -> list[dict[str, Any]]:
    """The columns of `schema.LATENT_TEXTS` that the form has, a dict an instruction.

    Raises:
        ModelError: the text encoder returned something that float16 cannot hold.
    """
    if form == "instruction":
        return [{} for _ in instructions]
    if form == "tokens":
        return [{"tokens": row} for row in model.tokens(instructions).tolist()]
    rows = _float16("embedding", model.encode_text(instructions))
    return [{"embedding": row.tobytes(), "embedding_shape": list(row.shape)} for row in rows]


def _encode(model: StableDiffusion, source: UINT8, edited: UINT8) -> dict[str, FLOAT16]:
    source_mode, _ = model.encode_image(_to_tensor(source))
    mean, std = model.encode_image(_to_tensor(edited))
    tensors = dict(zip(ARRAYS, (mean, std, source_mode), strict=True))
    return {name: _float16(name, tensor) for name, tensor in tensors.items()}


def _float16(name: str, tensor: torch.Tensor) -> FLOAT16:
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ModelError(
            f"{name} from the autoencoder is not finite in float16 (largest magnitude "
            f"{float(tensor.abs().max()):g}); check the weights, or their dtype"
        )
    array: FLOAT16 = half.cpu().contiguous().numpy()
    return array


def _to_tensor(images: UINT8) -> torch.Tensor:
    levels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return levels.float() / 127.5 - 1.0


class LatentDataset(MappedRows):
    """Encoded pairs by triplet group. Satisfies `training.feed.Latents`."""

    def __init__(self, paths: Paths, *, cache: Path | None = None):
        """Opens shards of `schema.LATENTS`, as `mapped.MappedRows` does.

        Raises:
            DatasetError: as there; also unequal shapes or truncated arrays.
        """
        super().__init__(paths, LATENTS, name="latents", optional=LATENT_TEXTS, cache=cache)
        self.shape = self._shape()
        """(channel, height, width) of every latent."""
        for name in [*ARRAYS, *(f"{name}{FLIPPED}" for name in ARRAYS)]:
            self._check_sizes(name, 2 * math.prod(self.shape))
        self._embedding_shape: tuple[int, ...] | None = None
        if self.has("embedding"):
            shape = self._embedding_shape = tuple(self.value("embedding_shape", 0).as_py())
            self._check_sizes("embedding", 2 * math.prod(shape))

    def require_model(self, model: StableDiffusion) -> None:
        """Returns if the model could have made these latents, by their shapes.

        Raises:
            DatasetError: it could not; says what differs.
        """
        width = int(model.unet.config["cross_attention_dim"])
        expected: dict[str, tuple[Any, Any]] = {
            "latent channels": (self.shape[0], model.latent_channels)
        }
        if self._embedding_shape is not None:
            expected["an embedding's shape"] = (self._embedding_shape, (model.text_length, width))
        elif self.has("tokens"):
            expected["tokens"] = (len(self.value("tokens", 0).as_py()), model.text_length)
        for name, (here, there) in expected.items():
            if here != there:
                raise DatasetError(
                    f"latents {self._name} were encoded by another model: {name} {here}, the "
                    f"model that training starts from has {there}"
                )

    def read(self, index: int, *, pick: float = 0.0, flip: bool = False) -> LatentRow:
        """One pair of a group: number floor(pick x pairs in it), mirrored on request."""
        row = self.row(index, pick)
        mean, std, mode = (
            self._array(name + FLIPPED if flip else name, row, self.shape) for name in ARRAYS
        )
        instruction: str = self.value("instruction", row).as_py()
        tokens = embedding = None
        if self._embedding_shape is not None:
            embedding = self._array("embedding", row, self._embedding_shape)
        elif self.has("tokens"):
            tokens = tuple(self.value("tokens", row).as_py())
        return LatentRow(instruction, mean, std, mode, tokens, embedding)

    def _array(self, name: str, row: int, shape: tuple[int, ...]) -> FLOAT16:
        flat = np.frombuffer(self.value(name, row).as_buffer(), dtype=np.float16)
        return flat.reshape(shape)

    def _shape(self) -> tuple[int, int, int]:
        column = self._table["shape"]
        first = column[0].as_py()
        same = all(
            pc.all(pc.equal(pc.list_value_length(chunk), len(first))).as_py()
            and bool((chunk.flatten().to_numpy().reshape(-1, len(first)) == first).all())
            for chunk in column.chunks
            if len(chunk)
        )
        shapes = {tuple(first)} if same else {tuple(shape) for shape in column.to_pylist()}
        if len(shapes) > 1 or len(next(iter(shapes))) != 3:
            raise DatasetError(
                f"latents {self._name} need one shape (channel, height, width), "
                f"got {sorted(shapes)[:4]}; encode all pairs at one resolution"
            )
        channels, height, width = next(iter(shapes))
        return channels, height, width

    def _check_sizes(self, name: str, expected: int) -> None:
        sizes = pc.min_max(pc.binary_length(self._table[name])).as_py()
        if set(sizes.values()) != {expected}:
            raise DatasetError(
                f"latents {self._name}: {name!r} holds arrays of {sizes['min']} to "
                f"{sizes['max']} bytes, {expected} expected of shape {self.shape}"
            )
