"""The rows of many shards in the order of a key that is a hash, each shard read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa

from ip2p_ray import parquet, storage

PART_ROWS = 50_000
"""Rows that are in memory at a time."""

_MOST_PARTS = 256
"""Files that are open at a time; of more rows than these hold more are in memory."""


def in_order(
    shards: Sequence[str], key: str, schema: pa.Schema, *, rows: int, part_rows: int = PART_ROWS
) -> Iterator[pa.Table]:
    """Tables of the shards' rows such that every key of one is below all keys of the next.

    Keys begin with eight digits of a hash in base 16. Of more than `part_rows` rows the parts wait
    on the disk of this machine (TMPDIR), in files without a name, which no kill leaves behind.
    `rows` is how many there are.
    """
    parts = max(1, min(_MOST_PARTS, -(-rows // part_rows)))
    read = (storage.read_table(shard, columns=schema.names).cast(schema) for shard in shards)
    if parts == 1:
        yield pa.concat_tables([schema.empty_table(), *read]).sort_by(key)
        return
    bounds = [f"{number * 2**32 // parts:08x}" for number in range(1, parts)]
    with ExitStack() as stack:
        files: list[Any] = [stack.enter_context(TemporaryFile()) for _ in range(parts)]
        with ExitStack() as writing:
            writers = [writing.enter_context(pa.ipc.new_file(file, schema)) for file in files]
            for table in read:
                ordered = table.sort_by(key)
                ends = np.searchsorted(ordered[key].to_numpy(), bounds).tolist()
                starts = [0, *ends]
                for writer, start, end in zip(writers, starts, [*ends, len(ordered)], strict=True):
                    if end > start:
                        writer.write_table(ordered.slice(start, end - start))
        for file in files:
            file.seek(0)
            yield parquet.opened_arrow(file, "a part").read_all().sort_by(key)
