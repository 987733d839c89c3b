import hashlib
import random

import pyarrow as pa
import pytest

from ip2p_ray.errors import DatasetError
from ip2p_ray.mapped import MappedRows

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("pair_key", "triplet_key", "instruction", "split")]
)
KEYS = ("a", "aa", "b", "\u00e9", "\uffee", "\U0001f6a2", "Z", "")
"""In the order of code points some of these are not in that of bytes of UTF-16."""


def made(path, count, *, chunk, seed=0):
    rng = random.Random(seed)
    rows = [
        {
            "pair_key": f"{rng.choice(KEYS)}{number}",
            "triplet_key": f"{rng.choice(KEYS)}{rng.randrange(count // 2 + 1)}",
            "instruction": str(number),
            "split": rng.choice(("train", "train", "held_out")),
        }
        for number in range(count)
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return rows


def plainly(rows, split):
    """Groups, and the digest of them, as Python sorts."""
    groups, digest = {}, hashlib.blake2b(digest_size=16)
    kept = [
        (row["triplet_key"], row["pair_key"], row["instruction"])
        for row in rows
        if split is None or row["split"] == split
    ]
    for triplet, pair, instruction in sorted(kept):
        digest.update(f"{triplet} {pair}\n".encode())
        groups.setdefault(triplet, []).append(instruction)
    return groups, digest.hexdigest()


@pytest.mark.parametrize("split", [None, "train", "held_out", "nowhere"])
@pytest.mark.parametrize(("count", "chunk"), [(1, 1), (7, 2), (300, 7), (300, 1_000)])
def test_groups_order_and_digest_are_those_of_sorted_rows(tmp_path, split, count, chunk):
    rows = made(tmp_path / "a.arrow", count, chunk=chunk, seed=count)
    dataset = MappedRows(tmp_path / "a.arrow", SCHEMA, name="rows")
    part = dataset if split is None else dataset.of(split)
    groups, digest = plainly(rows, split)
    assert part.digest == digest
    assert [part.key(index) for index in range(len(part))] == list(groups)
    assert part.pairs == sum(map(len, groups.values()))
    for index, inside in enumerate(groups.values()):
        found = [
            part.value("instruction", part.row(index, (place + 0.5) / len(inside))).as_py()
            for place in range(len(inside))
        ]
        assert found == inside


def test_more_rows_than_are_looked_at_at_once(tmp_path):
    rows = made(tmp_path / "a.arrow", 200_000, chunk=10_000)
    dataset = MappedRows(tmp_path / "a.arrow", SCHEMA, name="rows")
    groups, digest = plainly(rows, None)
    assert (dataset.digest, len(dataset)) == (digest, len(groups))
    # groups that stand on both sides of what is looked at at once are not cut
    assert [dataset.key(index) for index in range(len(dataset))] == list(groups)


def test_a_part_of_a_part_is_a_part_of_all(tmp_path):
    made(tmp_path / "a.arrow", 50, chunk=50)
    dataset = MappedRows(tmp_path / "a.arrow", SCHEMA, name="rows")
    assert dataset.of("train").of("held_out").digest == dataset.of("held_out").digest


def test_the_first_pair_that_is_there_twice_is_named(tmp_path):
    rows = made(tmp_path / "a.arrow", 9, chunk=9)
    again = [*rows, {**rows[6], "triplet_key": "x"}, {**rows[2], "triplet_key": "y"}]
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(again, schema=SCHEMA))
    with pytest.raises(DatasetError, match=f"hold pair {rows[2]['pair_key']} twice"):
        MappedRows(tmp_path / "b.arrow", SCHEMA, name="rows")


def test_any_pick_is_a_row_of_its_group(tmp_path):
    made(tmp_path / "a.arrow", 60, chunk=60)
    dataset = MappedRows(tmp_path / "a.arrow", SCHEMA, name="rows")
    for index in range(len(dataset)):
        key = dataset.key(index)
        rows = {dataset.row(index, pick) for pick in (0.0, 0.5, 0.999999, 1.0)}
        assert {dataset.value("triplet_key", row).as_py() for row in rows} == {key}
