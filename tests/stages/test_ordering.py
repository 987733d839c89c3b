import hashlib

import pyarrow as pa
import pytest

from ip2p_ray import storage
from ip2p_ray.stages.ordering import in_order

SCHEMA = pa.schema({"key": pa.string(), "number": pa.int64()})


def rows_of(numbers):
    keys = [hashlib.blake2b(str(n).encode(), digest_size=8).hexdigest() for n in numbers]
    return pa.table({"number": list(numbers), "key": keys})


@pytest.fixture
def shards(tmp_path):
    """Ten, of 0 to 90 rows in no order, and with a column more."""
    for number in range(10):
        table = rows_of(range(number * 100, number * 110))
        storage.write_shard(tmp_path, f"part-{number}", table.append_column("more", table["key"]))
    return storage.list_shards(tmp_path)


@pytest.mark.parametrize("part_rows", [1, 7, 100, 449, 450, 10_000])
def test_all_rows_come_in_order_however_many_are_in_memory(shards, part_rows):
    tables = list(in_order(shards, "key", SCHEMA, rows=450, part_rows=part_rows))
    keys = [key for table in tables for key in table["key"].to_pylist()]
    assert keys == sorted(keys)
    numbers = [n for table in tables for n in table["number"].to_pylist()]
    assert sorted(numbers) == [n for part in range(10) for n in range(part * 100, part * 110)]
    assert {table.schema for table in tables} == {SCHEMA}
    if part_rows >= 7:
        assert max(map(len, tables)) <= max(4 * part_rows, 20)


def test_no_rows_are_none(tmp_path):
    storage.write_shard(tmp_path, "part-0", rows_of(range(0)))
    (table,) = in_order(storage.list_shards(tmp_path), "key", SCHEMA, rows=0)
    assert table.schema == SCHEMA
    assert len(table) == 0


def test_no_shard_is_needed_once_the_first_rows_are_there(shards):
    tables = in_order(shards, "key", SCHEMA, rows=450, part_rows=10)
    first = next(tables)
    for shard in shards:
        storage.remove(shard)
    assert len(first) + sum(map(len, tables)) == 450
