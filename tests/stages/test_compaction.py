"""Sorted rows in few shards, whatever shards they came in; no Ray is needed."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip2p_ray import storage
from ip2p_ray.stages.compaction import compact

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.int64())])


def written(folder, shards):
    for number, keys in enumerate(shards):
        table = pa.table({"key": keys, "value": [int(key, 16) for key in keys]}, schema=SCHEMA)
        storage.write_shard(str(folder), f"block-{number:03d}", table)
    return storage.list_shards(str(folder))


def compacted(tmp_path, shards, most_bytes=1 << 20):
    out = str(tmp_path / "out")
    shards = written(tmp_path / "blocks", shards)
    compact(shards, out, name="part", key="key", schema=SCHEMA, most_bytes=most_bytes)
    return [pq.read_table(shard) for shard in storage.list_shards(out)]


@given(st.lists(st.lists(st.integers(0, 255).map("{:02x}".format), max_size=6), max_size=6))
def test_all_rows_come_out_in_order(tmp_path_factory, shards):
    found = pa.concat_tables(compacted(tmp_path_factory.mktemp("c"), shards))
    assert found["key"].to_pylist() == sorted(key for shard in shards for key in shard)
    assert found["value"].to_pylist() == [int(key, 16) for key in found["key"].to_pylist()]


def test_shards_are_cut_where_they_are_large_enough(tmp_path):
    tables = compacted(tmp_path, [["03", "04"], ["01", "02"], ["05", "06"]], most_bytes=1)
    assert [table["key"].to_pylist() for table in tables] == [
        ["01", "02"],
        ["03", "04"],
        ["05", "06"],
    ]


def test_no_rows_are_one_empty_shard(tmp_path):
    (table,) = compacted(tmp_path, [])
    assert table.schema == SCHEMA
    assert not table.num_rows


def test_shards_whose_keys_overlap_are_merged(tmp_path):
    (table,) = compacted(tmp_path, [["01", "09"], ["02", "0a"], ["03"]])
    assert table["key"].to_pylist() == ["01", "02", "03", "09", "0a"]


def test_a_shard_that_is_cut_is_an_error(tmp_path):
    (shard,) = written(tmp_path / "blocks", [["01", "02"]])
    whole = storage.local_path(shard).read_bytes()
    storage.local_path(shard).write_bytes(whole[:-9])
    with pytest.raises(pa.ArrowInvalid):
        compact([shard], str(tmp_path / "out"), name="part", key="key", schema=SCHEMA)
