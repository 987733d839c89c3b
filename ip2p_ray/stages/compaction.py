"""Many small shards of a plan -> few, in the order of their keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ip2p_ray import storage

SHARD_BYTES = 128 << 20


def compact(
    shards: Sequence[str],
    uri: str,
    *,
    name: str,
    key: str,
    schema: pa.Schema,
    most_bytes: int = SHARD_BYTES,
) -> None:
    """The rows of all shards, sorted by `key`, as shards of some `most_bytes` in memory.

    Of shards whose ranges of keys do not overlap, as those of a plan over sorted rows hardly do,
    one is in memory beside what is written next.
    """
    number, waiting = 0, schema.empty_table()
    for table in _in_order(shards, key, schema):
        waiting = pa.concat_tables([waiting, table])
        if waiting.nbytes >= most_bytes:
            storage.write_shard(uri, f"{name}-{number:05d}", waiting)
            number, waiting = number + 1, schema.empty_table()
    if len(waiting) or not number:
        storage.write_shard(uri, f"{name}-{number:05d}", waiting)


def _in_order(shards: Sequence[str], key: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of rows such that every key of one is below all keys of the next."""
    starts = sorted((start, shard) for shard in shards for start in _first_key(shard, key))
    open_rows = schema.empty_table()
    for place, (_, shard) in enumerate(starts):
        read = storage.read_table(shard, columns=schema.names).cast(schema)
        open_rows = pa.concat_tables([open_rows, read]).sort_by(key)
        if place + 1 == len(starts):
            yield open_rows
            return
        below = pc.less(open_rows[key], starts[place + 1][0])
        yield open_rows.filter(below)
        open_rows = open_rows.filter(pc.invert(below))


def _first_key(shard: str, key: str) -> list[str]:
    """The lowest key of a shard; none where it has no rows."""
    keys = storage.read_table(shard, columns=[key])[key]
    return [pc.min(keys).as_py()] if len(keys) else []
