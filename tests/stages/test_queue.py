"""Which triplets are used: no Ray is needed."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray import storage
from ip2p_ray.errors import DatasetError, StageError
from ip2p_ray.schema import REJECTS, TRIPLETS
from ip2p_ray.stages import queue
from ip2p_ray.testing.pairs import write_triplets


def spoiled(tmp_path):
    """20 triplets and six rows that nobody can use."""
    uri = str(tmp_path / "triplets")
    write_triplets(uri, 20)
    rows = storage.read_dataset(uri, TRIPLETS).to_pylist()
    bad = [
        {**rows[0]},
        {**rows[1], "caption": None},
        {**rows[2], "edited_caption": "  "},
        {**rows[3], "instruction": "make it a frog"},
        {**rows[4], "triplet_key": None},
        {**rows[5], "split": None},
    ]
    storage.write_shard(uri, "triplets-00001", pa.Table.from_pylist(bad, schema=TRIPLETS))
    storage.write_manifest(uri, storage.Manifest(dataset="triplets", recipe="spoiled"))
    return uri, rows


def test_each_usable_triplet_is_there_once_and_the_rest_have_reasons(tmp_path):
    uri, rows = spoiled(tmp_path)
    made = queue.fill_queue(uri, str(tmp_path), max_reject_share=0.3)
    found = storage.read_dataset(str(tmp_path / "queue"), TRIPLETS).to_pylist()
    assert found == sorted(rows, key=lambda row: row["triplet_key"])
    rejects = storage.read_dataset(str(tmp_path / "rejects" / "queue"), REJECTS).to_pylist()
    assert [row["reason"] for row in rejects if row["reason"] != queue.DUPLICATE] == [
        queue.NO_TEXT,
        queue.NO_TEXT,
        queue.WRONG_KEY,
        queue.WRONG_KEY,
        queue.UNKNOWN_SPLIT,
    ]
    assert sum(row["reason"] == queue.DUPLICATE for row in rejects) == 1
    assert made.reports[0]["rows_in"] == 26
    assert made.reports[0]["rejected"] == {
        "no_text": 2,
        "wrong_key": 2,
        "duplicate": 1,
        "unknown_split": 1,
    }


def test_too_many_unusable_ones_end_the_stage_and_say_which(tmp_path):
    uri, _ = spoiled(tmp_path)
    with pytest.raises(StageError) as caught:
        queue.fill_queue(uri, str(tmp_path), max_reject_share=0.23)
    assert str(caught.value) == (
        f"queue: 6 of 26 triplets of {uri} cannot be used, more than the 23% allowed: no_text 2, "
        f"wrong_key 2, duplicate 1, unknown_split 1; which, is in {tmp_path}/rejects/queue; mend "
        "them, or raise --max-reject-share"
    )
    assert not (tmp_path / "queue" / storage.MANIFEST).exists()
    rejects = storage.read_dataset(str(tmp_path / "rejects" / "queue"), REJECTS)
    assert rejects.num_rows == 6
    assert queue.fill_queue(uri, str(tmp_path), max_reject_share=0.24).rows == 20


def test_parts_hold_so_many_each_in_the_order_of_the_keys(tmp_path):
    write_triplets(str(tmp_path / "triplets"), 20)
    made = queue.fill_queue(str(tmp_path / "triplets"), str(tmp_path), part_triplets=8)
    assert [shard.rows for shard in made.shards] == [8, 8, 4]
    for shard in storage.list_shards(str(tmp_path / "queue")):
        keys = pq.read_table(shard)["triplet_key"].to_pylist()
        assert keys == sorted(keys)


def test_a_smaller_limit_is_part_of_a_larger(tmp_path):
    write_triplets(str(tmp_path / "triplets"), 50)
    drawn = {}
    for limit in (7, 20, 80):
        folder = str(tmp_path / str(limit))
        made = queue.fill_queue(str(tmp_path / "triplets"), folder, limit=limit)
        rows = storage.read_dataset(f"{folder}/queue", TRIPLETS)
        drawn[limit] = set(rows["triplet_key"].to_pylist())
        assert made.rows == len(drawn[limit]) == min(limit, 50)
        assert not storage.read_dataset(f"{folder}/rejects/queue", REJECTS).num_rows
    assert drawn[7] < drawn[20] < drawn[80]


def test_what_holds_no_triplets_is_named(tmp_path):
    uri = str(tmp_path / "triplets")
    storage.write_shard(uri, "t-0", pa.table({"caption": ["a cat"]}))
    storage.write_manifest(uri, storage.Manifest(dataset="triplets"))
    with pytest.raises(DatasetError, match=r"shard .*t-0.parquet holds no triplets: it lacks"):
        queue.fill_queue(uri, str(tmp_path))


def test_a_column_that_is_no_text_is_named(tmp_path):
    uri = str(tmp_path / "triplets")
    write_triplets(uri, 3)
    table = storage.read_dataset(uri, TRIPLETS)
    place = table.column_names.index("writer")
    numbers = table.set_column(place, "writer", pa.array([1, 2, 3]))
    storage.write_shard(uri, "triplets-00000", numbers)
    with pytest.raises(DatasetError, match="holds no triplets: its column writer is int64"):
        queue.fill_queue(uri, str(tmp_path))
