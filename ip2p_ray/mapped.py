"""Rows of shards by index, from memory-mapped files: nothing is loaded before it is read.

Rows belong to groups (their triplet key). Groups are sorted by that key and the rows of a group by
pair key, so an index means the same row however the shards were cut. In memory are some ten bytes a
row; while the shards are opened, some hundred and fifty.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ip2p_ray import parquet
from ip2p_ray.atomic import atomic_file
from ip2p_ray.errors import DatasetError

Mapped = TypeVar("Mapped", bound="MappedRows")

Paths = str | Path | Iterable[str | Path]
ROWS = npt.NDArray[np.uint32 | np.uint64]

_ROWS_AT_ONCE = 1 << 16


class MappedRows:
    """The rows of shards of one schema, which has pair_key, triplet_key, split and instruction."""

    def __init__(
        self,
        paths: Paths,
        schema: pa.Schema,
        *,
        name: str,
        optional: Sequence[pa.Field] = (),
        cache: Path | None = None,
        rows_at_a_time: int = 1024,
    ) -> None:
        """Opens .arrow files, .parquet files, or folders of either.

        Parquet cannot be memory-mapped, so it is converted once, to one Arrow file in the folder
        `cache` (by default beside the first shard), made anew when a shard changed. `name` is that
        of the dataset, for people; `optional` are columns that are kept where all shards have them.

        Raises:
            DatasetError: nothing there, unreadable, another schema, or a pair that occurs twice.
        """
        self._what = name
        self._rows_at_a_time = rows_at_a_time
        shards = self._shards([paths] if isinstance(paths, str | Path) else list(paths))
        self._name = str(shards[0]) if len(shards) == 1 else f"{shards[0]} (+{len(shards) - 1})"
        held = [set(self._columns(shard)) for shard in shards]
        extra = [field for field in optional if all(field.name in names for names in held)]
        self._schema = pa.schema([*schema, *extra])
        self._table = pa.concat_tables(self._open(path) for path in self._mapped(shards, cache))
        if self._table.num_rows == 0:
            raise DatasetError(f"{name} {self._name} hold no rows")
        for field in self._schema:
            if self._table[field.name].null_count:
                raise DatasetError(f"{name} {self._name} have nulls in {field.name!r}")
        self._sorted = self._in_order()
        self._rows, self._starts, self.digest = self._index(None)

    def __len__(self) -> int:
        """The number of groups."""
        return len(self._starts) - 1

    @property
    def pairs(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def of(self: Mapped, split: str) -> Mapped:
        """Only the rows of that split, which may be none; their columns are shared with this."""
        part = copy.copy(self)
        part._rows, part._starts, part.digest = self._index(split)
        return part

    def key(self, index: int) -> str:
        """The triplet key of a group."""
        found: str = self.value("triplet_key", int(self._rows[self._starts[index]])).as_py()
        return found

    def row(self, index: int, pick: float) -> int:
        """The place of one row of a group: number floor(pick x rows in it)."""
        start, end = self._starts[index], self._starts[index + 1]
        return int(self._rows[start + min(int(pick * int(end - start)), int(end - start) - 1)])

    def value(self, name: str, row: int) -> Any:
        """Of a column, as Arrow's scalar."""
        return self._table[name][row]

    def has(self, name: str) -> bool:
        """Whether there is such a column."""
        return name in self._schema.names

    def _in_order(self) -> ROWS:
        """The places of all rows, by triplet key and pair key."""
        keys = self._table.select(["triplet_key", "pair_key"])
        if pc.count_distinct(keys["pair_key"]).as_py() < len(keys):
            counts = pc.value_counts(keys["pair_key"])
            twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
            raise DatasetError(f"{self._what} {self._name} hold pair {twice} twice")
        by = [("triplet_key", "ascending"), ("pair_key", "ascending")]
        kind = np.uint32 if len(keys) < 2**32 else np.uint64
        order: ROWS = pc.sort_indices(keys, sort_keys=by).to_numpy().astype(kind)
        return order

    def _index(self, split: str | None) -> tuple[ROWS, npt.NDArray[np.int64], str]:
        """Rows in order, where the rows of each group begin among them, and the digest."""
        rows = self._sorted
        if split is not None:
            of_split = pc.equal(self._table["split"], split).to_numpy()
            rows = rows[of_split[rows]]
        digest = hashlib.blake2b(digest_size=16)
        columns = [_one(self._table[name]) for name in ("triplet_key", "pair_key")]
        between = pa.scalar(" ", pa.large_string())
        starts, last = [], None
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            triplets, pairs = (
                column.take(pa.array(rows[begin : begin + _ROWS_AT_ONCE])) for column in columns
            )
            lines = pc.binary_join_element_wise(triplets, pairs, between).to_pylist()
            digest.update(("\n".join(lines) + "\n").encode())
            new = np.ones(len(triplets), np.bool_)
            new[1:] = pc.not_equal(triplets[1:], triplets[:-1]).to_numpy(zero_copy_only=False)
            new[0] = triplets[0].as_py() != last
            starts.append(begin + np.flatnonzero(new))
            last = triplets[-1].as_py()
        starts.append(np.array([len(rows)]))
        return rows, np.concatenate(starts).astype(np.int64), digest.hexdigest()

    def _shards(self, paths: Sequence[str | Path]) -> list[Path]:
        found: list[Path] = []
        for path in map(Path, paths):
            inside = [
                item for item in sorted(path.glob("*")) if not item.name.startswith((".", "_"))
            ]
            found += inside if path.is_dir() else [path]
        shards = [path for path in found if path.suffix in (".arrow", ".parquet")]
        missing = [path for path in found if not path.exists()]
        if missing or not shards:
            where = ", ".join(map(str, missing or paths)) or "an empty list"
            raise DatasetError(
                f"no {self._what} at {where}: .parquet or .arrow shards are expected"
            )
        return shards

    def _mapped(self, shards: Sequence[Path], cache: Path | None) -> list[Path]:
        """The .arrow files, with one made from all Parquet shards together."""
        parquet = [path for path in shards if path.suffix == ".parquet"]
        arrow = [path for path in shards if path.suffix == ".arrow"]
        if not parquet:
            return arrow
        stamps = [
            (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in parquet
        ]
        name = hashlib.blake2b(repr(stamps).encode(), digest_size=8).hexdigest()
        converted = (cache or parquet[0].parent) / f".{self._what}-{name}.arrow"
        if not converted.exists():
            self._convert(parquet, converted)
        return [*arrow, converted]

    def _convert(self, shards: Sequence[Path], target: Path) -> None:
        """One Arrow file of all shards, visible only when whole; of two processes one makes it."""
        with atomic_file(target) as path:
            if target.exists():
                return  # made by another while this one waited
            with path.open("wb") as file, pa.ipc.new_file(file, self._schema) as writer:
                for shard in shards:
                    for batch in self._parquet_batches(shard):
                        writer.write_batch(batch)

    def _parquet_batches(self, shard: Path) -> Iterable[pa.RecordBatch]:
        names = self._schema.names
        try:
            with parquet.opened(shard) as file:
                self._check_schema(shard, file.schema_arrow)
                for batch in file.iter_batches(batch_size=self._rows_at_a_time, columns=names):
                    yield self._conform(batch)
        except (pa.ArrowException, OSError) as error:
            raise self._broken(shard, error) from error

    def _open(self, path: Path) -> pa.Table:
        try:
            with pa.memory_map(str(path)) as source:
                table = parquet.opened_arrow(source, path).read_all()
            self._check_schema(path, table.schema)
            return self._conform(table)
        except (pa.ArrowException, OSError) as error:
            raise self._broken(path, error) from error

    def _columns(self, shard: Path) -> list[str]:
        try:
            if shard.suffix == ".parquet":
                return list(parquet.read_schema(shard).names)
            with pa.memory_map(str(shard)) as source:
                return list(parquet.opened_arrow(source, shard).schema.names)
        except (pa.ArrowException, OSError) as error:
            raise self._broken(shard, error) from error

    def _conform(self, data: Any) -> Any:
        """The table or batch with exactly these columns; nothing is copied where it fits."""
        chosen = data.select(self._schema.names)
        return chosen if chosen.schema.equals(self._schema) else chosen.cast(self._schema)

    def _check_schema(self, path: Path, schema: pa.Schema) -> None:
        missing = [name for name in self._schema.names if name not in schema.names]
        if missing:
            raise DatasetError(
                f"{self._what} shard {path} has no column {', '.join(missing)}; it has "
                f"{', '.join(schema.names)}"
            )

    def _broken(self, path: Path, error: Exception) -> DatasetError:
        return DatasetError(f"{self._what} shard {path} cannot be read: {error}")


def _one(column: pa.ChunkedArray) -> pa.Array:
    """The column in one piece: of many, Arrow would join them anew at every look."""
    return column.cast(pa.large_string()).combine_chunks()
