"""Rows of shards by index, from memory-mapped files: nothing is loaded before it is read.

Rows belong to groups (their triplet key). Groups are sorted by that key and the rows of a group by
pair key, so an index means the same row however the shards were cut.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from ip2p_ray import parquet
from ip2p_ray.atomic import atomic_file
from ip2p_ray.errors import DatasetError

Mapped = TypeVar("Mapped", bound="MappedRows")

Paths = str | Path | Iterable[str | Path]


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
        self._keys, self._groups, self.digest = self._index(None)

    def __len__(self) -> int:
        """The number of groups."""
        return len(self._groups)

    @property
    def pairs(self) -> int:
        """The number of rows."""
        return sum(map(len, self._groups))

    def of(self: Mapped, split: str) -> Mapped:
        """Only the rows of that split, which may be none; their columns are shared with this."""
        part = copy.copy(self)
        part._keys, part._groups, part.digest = self._index(split)
        return part

    def key(self, index: int) -> str:
        """The triplet key of a group."""
        return self._keys[index]

    def row(self, index: int, pick: float) -> int:
        """The place of one row of a group: number floor(pick x rows in it)."""
        rows = self._groups[index]
        return rows[min(int(pick * len(rows)), len(rows) - 1)]

    def value(self, name: str, row: int) -> Any:
        """Of a column, as Arrow's scalar."""
        return self._table[name][row]

    def has(self, name: str) -> bool:
        """Whether there is such a column."""
        return name in self._schema.names

    def _index(self, split: str | None) -> tuple[list[str], list[list[int]], str]:
        columns = [self._table[name].to_pylist() for name in ("triplet_key", "pair_key", "split")]
        twice = [key for key, count in Counter(columns[1]).items() if count > 1]
        if twice:
            raise DatasetError(f"{self._what} {self._name} hold pair {twice[0]} twice")
        digest = hashlib.blake2b(digest_size=16)
        groups: dict[str, list[int]] = {}
        rows = zip(*columns, range(self._table.num_rows), strict=True)
        for triplet_key, pair_key, own, row in sorted(rows):
            if split is None or own == split:
                digest.update(f"{triplet_key} {pair_key}\n".encode())
                groups.setdefault(triplet_key, []).append(row)
        return list(groups), list(groups.values()), digest.hexdigest()

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
