"""Tables read and written a part at a time, for datasets whose pictures never fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError, DatasetError
from ip2p_ray.stages import run

SHARD_BYTES = 128 << 20
"""About the most that a shard holds; as much is in memory."""

SHARD_ROWS = 20_000
"""The most rows of a shard."""

PICTURE_ROWS = 16
"""Rows with pictures that are read at a time."""


class TableShards:
    """Writes tables, told one by one, as shards of bounded size."""

    def __init__(
        self,
        uri: str,
        name: str,
        schema: pa.Schema,
        *,
        rows: int = SHARD_ROWS,
        size: int = SHARD_BYTES,
        first: int = 0,
    ) -> None:
        self._uri, self._name, self._schema = uri, name, schema
        self._most_rows, self._most_bytes = rows, size
        self._parts: list[pa.Table] = []
        self._bytes = self._held = 0
        self.rows = 0
        """How many were told."""
        self.shards = first
        """The number of the next."""

    def add(self, table: pa.Table) -> None:
        """More rows, with at least the columns of the schema."""
        while table.num_rows:
            part = table.slice(0, self._most_rows - self._held)
            table = table.slice(part.num_rows)
            self._parts.append(part.select(self._schema.names).cast(self._schema))
            self._held += part.num_rows
            self._bytes += part.nbytes
            self.rows += part.num_rows
            if self._held == self._most_rows or self._bytes >= self._most_bytes:
                self._write()

    def add_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """More rows, as dictionaries of at least the columns of the schema."""
        names = self._schema.names
        kept = [{name: row[name] for name in names} for row in rows]
        self.add(pa.Table.from_pylist(kept, schema=self._schema))

    def close(self, *, empty: bool = True) -> None:
        """Writes what is left, and (if `empty`) one shard without rows where there were none."""
        if self._held or (empty and not self.shards):
            self._write()

    def _write(self) -> None:
        table = pa.concat_tables([self._schema.empty_table(), *self._parts])
        # An export's schema carries metadata that readers look for.
        table = table.replace_schema_metadata(self._schema.metadata)
        storage.write_shard(self._uri, f"{self._name}-{self.shards:05d}", table)
        self.shards += 1
        self._parts.clear()
        self._bytes = self._held = 0


def read_tables(
    uri: str, schema: pa.Schema, *, rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of a whole dataset, so many at a time, with the schema's columns (or `columns`).

    Raises:
        DatasetError: not whole, or a shard is broken or lacks a column; named.
    """
    manifest = storage.require_manifest(uri)
    assert manifest is not None
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    for shard in manifest.shards:
        path = storage.join(uri, shard.name)
        try:
            with storage.open_parquet(path) as file:
                missing = [name for name in schema.names if name not in file.schema_arrow.names]
                if missing:
                    raise DatasetError(f"shard {path} has no column {', '.join(missing)}")
                for batch in file.iter_batches(rows, columns=schema.names, use_threads=False):
                    yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DatasetError(f"shard {path} cannot be read: {error}") from error


def clear(uri: str) -> None:
    """Removes what a killed run left of a dataset that is now being made."""
    storage.remove_shards(uri)


def require_free(uri: str) -> None:
    """Checks that the folder is free for a dataset: shards that lie in it would be deleted.

    Raises:
        ConfigError: it holds something, and not a dataset or the beginning of one.
    """
    if any(storage.exists(storage.join(uri, name)) for name in (run.ORIGIN, storage.MANIFEST)):
        return
    found = next((name for name in storage.names(uri) if name[0] != "."), None)
    if found is not None:
        raise ConfigError(f"folder {uri} is not empty ({found} is in it); give a new one")
