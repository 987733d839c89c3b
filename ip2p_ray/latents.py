"""Encoded pairs: what the autoencoder makes of the images, once, so that training never runs it.

encode_pairs makes the columns of `schema.LATENTS`; LatentDataset reads them back by index from
memory-mapped files.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ip2p_ray.atomic import atomic_file
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError, DatasetError, ModelError
from ip2p_ray.schema import LATENTS
from ip2p_ray.training.feed import FLOAT16, LatentRow

ARRAYS = ("edited_mean", "edited_std", "source_mode")
FLIPPED = "_flipped"
UINT8 = npt.NDArray[np.uint8]


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


class LatentDataset:
    """Encoded pairs by triplet group, in memory-mapped files: nothing is loaded before it is read.

    Groups are sorted by triplet key and the pairs of a group by pair key, so an index means the
    same pair however the shards were cut. Satisfies `training.feed.Latents`.
    """

    def __init__(self, paths: str | Path | Iterable[str | Path], *, cache: Path | None = None):
        """Opens shards of `schema.LATENTS`: .arrow files, .parquet files, or folders of either.

        Parquet cannot be memory-mapped, so it is converted once, to one Arrow file in the folder
        `cache` (by default beside the first shard), made anew when a shard changed.

        Raises:
            DatasetError: nothing there, unreadable, another schema, unequal shapes, truncated
                arrays, or a pair that occurs twice.
        """
        shards = _shards([paths] if isinstance(paths, str | Path) else list(paths))
        self._name = str(shards[0]) if len(shards) == 1 else f"{shards[0]} (+{len(shards) - 1})"
        self._table = pa.concat_tables(_open(path) for path in _mapped(shards, cache))
        self.shape = self._check()
        """(channel, height, width) of every latent."""
        self._keys, self._groups, self.digest = self._index()

    def __len__(self) -> int:
        """The number of groups."""
        return len(self._groups)

    @property
    def pairs(self) -> int:
        """The number of pairs."""
        return int(self._table.num_rows)

    def key(self, index: int) -> str:
        """The triplet key of a group."""
        return self._keys[index]

    def read(self, index: int, *, pick: float = 0.0, flip: bool = False) -> LatentRow:
        """One pair of a group: number floor(pick x pairs in it), mirrored on request."""
        rows = self._groups[index]
        row = rows[min(int(pick * len(rows)), len(rows) - 1)]
        mean, std, mode = (self._array(name + FLIPPED if flip else name, row) for name in ARRAYS)
        instruction: str = self._table["instruction"][row].as_py()
        return LatentRow(instruction, mean, std, mode)

    def _array(self, name: str, row: int) -> FLOAT16:
        flat = np.frombuffer(self._table[name][row].as_buffer(), dtype=np.float16)
        return flat.reshape(self.shape)

    def _check(self) -> tuple[int, int, int]:
        if self._table.num_rows == 0:
            raise DatasetError(f"latents {self._name} hold no rows")
        for field in LATENTS:
            if self._table[field.name].null_count:
                raise DatasetError(f"latents {self._name} have nulls in {field.name!r}")
        shapes = {tuple(shape) for shape in self._table["shape"].to_pylist()}
        if len(shapes) > 1 or len(next(iter(shapes))) != 3:
            raise DatasetError(
                f"latents {self._name} need one shape (channel, height, width), "
                f"got {sorted(shapes)[:4]}; encode all pairs at one resolution"
            )
        channels, height, width = next(iter(shapes))
        expected = 2 * channels * height * width
        for name in [*ARRAYS, *(f"{name}{FLIPPED}" for name in ARRAYS)]:
            sizes = pc.min_max(pc.binary_length(self._table[name])).as_py()
            if set(sizes.values()) != {expected}:
                raise DatasetError(
                    f"latents {self._name}: {name!r} holds arrays of {sizes['min']} to "
                    f"{sizes['max']} bytes, {expected} expected of shape {next(iter(shapes))}"
                )
        return channels, height, width

    def _index(self) -> tuple[list[str], list[list[int]], str]:
        pair_keys = self._table["pair_key"].to_pylist()
        triplet_keys = self._table["triplet_key"].to_pylist()
        twice = [key for key, count in Counter(pair_keys).items() if count > 1]
        if twice:
            raise DatasetError(f"latents {self._name} hold pair {twice[0]} twice")
        digest = hashlib.blake2b(digest_size=16)
        groups: dict[str, list[int]] = {}
        rows = zip(triplet_keys, pair_keys, range(len(pair_keys)), strict=True)
        for triplet_key, pair_key, row in sorted(rows):
            digest.update(f"{triplet_key} {pair_key}\n".encode())
            groups.setdefault(triplet_key, []).append(row)
        return list(groups), list(groups.values()), digest.hexdigest()


def _shards(paths: Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [item for item in sorted(path.glob("*")) if not item.name.startswith((".", "_"))]
        found += inside if path.is_dir() else [path]
    shards = [path for path in found if path.suffix in (".arrow", ".parquet")]
    missing = [path for path in found if not path.exists()]
    if missing or not shards:
        where = ", ".join(map(str, missing or paths)) or "an empty list"
        raise DatasetError(f"no latents at {where}: .parquet or .arrow shards are expected")
    return shards


def _mapped(shards: Sequence[Path], cache: Path | None) -> list[Path]:
    """The .arrow files, with one made from all Parquet shards together."""
    parquet = [path for path in shards if path.suffix == ".parquet"]
    arrow = [path for path in shards if path.suffix == ".arrow"]
    if not parquet:
        return arrow
    folder = cache or parquet[0].parent
    stamps = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in parquet
    ]
    name = hashlib.blake2b(repr(stamps).encode(), digest_size=8).hexdigest()
    converted = folder / f".latents-{name}.arrow"
    if not converted.exists():
        _convert(parquet, converted)
    return [*arrow, converted]


def _convert(shards: Sequence[Path], target: Path) -> None:
    """One Arrow file of all shards, visible only when whole; of two processes one makes it."""
    with atomic_file(target) as path:
        if target.exists():
            return  # made by another while this one waited
        with path.open("wb") as file, pa.ipc.new_file(file, LATENTS) as writer:
            for shard in shards:
                for batch in _parquet_batches(shard):
                    writer.write_batch(batch)


def _parquet_batches(shard: Path) -> Iterable[pa.RecordBatch]:
    try:
        with pq.ParquetFile(shard) as file:
            _check_schema(shard, file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024, columns=LATENTS.names):
                yield _conform(batch)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"latents shard {shard} cannot be read: {error}") from error


def _open(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        _check_schema(path, table.schema)
        return _conform(table)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"latents shard {path} cannot be read: {error}") from error


def _conform(data: Any) -> Any:
    """The table or batch with exactly the columns of LATENTS; nothing is copied where it fits."""
    chosen = data.select(LATENTS.names)
    return chosen if chosen.schema.equals(LATENTS) else chosen.cast(LATENTS)


def _check_schema(path: Path, schema: pa.Schema) -> None:
    missing = [name for name in LATENTS.names if name not in schema.names]
    if missing:
        raise DatasetError(
            f"latents shard {path} has no column {', '.join(missing)}; it has "
            f"{', '.join(schema.names)}"
        )
