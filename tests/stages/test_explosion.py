"""Rows of candidates from rows of triplets; no Ray is needed for that."""

import pyarrow as pa
import pytest

from ip2p_ray import storage
from ip2p_ray.schema import CANDIDATES, SCORES, SIMILARITIES, pair_key
from ip2p_ray.stages import explosion

IMAGE = {"bytes": b"png", "path": None}


def candidate(index, reason):
    return {
        "index": index,
        "seed": 10 + index,
        "self_replace": 0.25,
        "guidance_scale": 3.0,
        **dict.fromkeys(SIMILARITIES, 0.5),
        "reason": reason,
        "source_image": None if reason else IMAGE,
        "edited_image": None if reason else IMAGE,
    }


@pytest.fixture
def shard(tmp_path):
    rows = [
        {"triplet_key": "a", "recipe": "r", "split": "train", "candidates": [candidate(0, None)]},
        {"triplet_key": "b", "recipe": "r", "split": "train", "candidates": []},
        {
            "triplet_key": "c",
            "recipe": "r",
            "split": "held_out",
            "candidates": [candidate(0, "not_best"), candidate(1, None)],
        },
    ]
    uri = str(tmp_path)
    storage.write_shard(uri, "c-0", pa.Table.from_pylist(rows, schema=CANDIDATES))
    return storage.list_shards(uri)[0]


def test_each_candidate_is_a_row_with_the_columns_of_its_triplet(shard):
    rows = explosion.exploded(shard).to_pylist()
    assert [(row["triplet_key"], row["index"], row["reason"]) for row in rows] == [
        ("a", 0, None),
        ("c", 0, "not_best"),
        ("c", 1, None),
    ]
    assert [row["pair_key"] for row in rows] == [
        pair_key("a", 0, "r"),
        pair_key("c", 0, "r"),
        pair_key("c", 1, "r"),
    ]
    assert rows[2]["edited_image"] == IMAGE
    assert rows[1]["source_image"] is None


def test_images_are_read_only_where_they_are_wanted(shard):
    table = explosion.exploded(shard, images=False)
    assert not {"source_image", "edited_image"} & set(table.column_names)
    assert table.select(SCORES.names).cast(SCORES).num_rows == 3


def test_only_some_triplets(shard):
    assert explosion.exploded(shard, only=["c"])["triplet_key"].to_pylist() == ["c", "c"]
    assert not explosion.exploded(shard, only=["x"]).num_rows


def test_rows_are_cut_into_shards_and_no_rows_are_one(tmp_path):
    schema = pa.schema([("n", pa.int64())])
    tables = [pa.table({"n": list(range(5))}), pa.table({"n": [5, 6, 7]})]
    explosion._write(str(tmp_path / "some"), "x", schema, iter(tables), 3)
    some = storage.list_shards(str(tmp_path / "some"))
    found = [storage.pq.read_table(place)["n"].to_pylist() for place in some]
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7]]
    explosion._write(str(tmp_path / "none"), "x", schema, iter([]), 3)
    (none,) = storage.list_shards(str(tmp_path / "none"))
    assert not storage.pq.read_table(none).num_rows
