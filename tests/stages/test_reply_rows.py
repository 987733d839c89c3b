"""The rows of replies: which are final, and what is asked again."""

import pyarrow as pa
import pytest

from ip2p_ray import storage
from ip2p_ray.errors import BudgetError, StageError
from ip2p_ray.schema import CAPTIONS
from ip2p_ray.stages import reply_rows
from ip2p_ray.stages.reply_rows import REPLIES, drop_unanswered, is_to_be_asked_again
from ip2p_ray.triplets.reply import NO_REPLY


def write(folder, *statuses):
    """A shard of replies with these."""
    rows = [
        dict.fromkeys(REPLIES.names, "a") | {"caption_key": f"{number:032x}", "status": status}
        for number, status in enumerate(statuses)
    ]
    storage.write_shard(str(folder), "a", pa.Table.from_pylist(rows, schema=REPLIES))


@pytest.mark.parametrize("status", ["ok", NO_REPLY])
def test_what_has_no_reply_is_dropped_from_a_bucket_too(bucket, status):
    folder = f"{bucket}/run"
    row = dict.fromkeys(REPLIES.names, "a") | {"status": status}
    names = ("triplets", "rejects/triplets", "replies", "candidates")
    for name in names:
        storage.write_shard(f"{folder}/{name}", "a", pa.Table.from_pylist([row], schema=REPLIES))
        storage.write_manifest(f"{folder}/{name}", storage.Manifest(dataset=name))
    if status == NO_REPLY:
        with pytest.raises(StageError, match=r"1 captions .*triplets that candidates in s3://"):
            drop_unanswered(folder)
    assert all(storage.any_there(f"{folder}/{name}") for name in names)
    storage.remove_all(f"{folder}/candidates")
    assert drop_unanswered(folder) == (status == NO_REPLY)
    assert all(storage.any_there(f"{folder}/{name}") == (status == "ok") for name in names[:3])


def test_a_cut_shard_is_asked_for_again(tmp_path):
    folder = tmp_path / "replies"
    folder.mkdir()
    assert not is_to_be_asked_again(str(folder))
    (folder / "a_000000_000000.parquet").write_bytes(b"")
    assert drop_unanswered(str(tmp_path)) == 0
    assert is_to_be_asked_again(str(folder))


def test_a_dataset_of_replies_has_what_triplets_are_made_of():
    assert set(CAPTIONS.names) < set(REPLIES.names)


def test_who_stopped_the_asking_is_told_before_those_without_a_reply(tmp_path):
    write(tmp_path, NO_REPLY, "stopped BudgetError", "ok")
    with pytest.raises(BudgetError, match="once there is more, the same command goes on"):
        reply_rows.judge(str(tmp_path), 3, 1.0)
    assert is_to_be_asked_again(str(tmp_path))


def test_as_many_as_are_allowed_may_have_no_reply(tmp_path):
    write(tmp_path, NO_REPLY, "refused", "ok", "ok")
    reply_rows.judge(str(tmp_path), 4, 0.25)
    with pytest.raises(StageError, match=r"1 of 4 captions got none, more than the 24% allowed"):
        reply_rows.judge(str(tmp_path), 4, 0.24)


def test_which_captions_have_no_reply_is_one_digest_in_any_order(tmp_path):
    for name, statuses in (
        ("none", ["ok", "refused"]),
        ("last", ["ok", "ok", NO_REPLY]),
        ("both", [NO_REPLY, "ok", NO_REPLY]),
    ):
        write(tmp_path / name, *statuses)
    assert reply_rows.unanswered(str(tmp_path / "none")) is None
    last, both = (reply_rows.unanswered(str(tmp_path / name)) for name in ("last", "both"))
    assert None not in (last, both)
    assert last != both
    halves = storage.read_table(storage.list_shards(str(tmp_path / "both"))[0])
    for name, half in (("b", halves[:1]), ("a", halves[1:])):
        storage.write_shard(str(tmp_path / "halves"), name, half)
    assert reply_rows.unanswered(str(tmp_path / "halves")) == both


def test_verdicts_count_only_what_is_final():
    statuses = ["ok", "ok", "refused", NO_REPLY, "stopped ConfigError"]
    assert reply_rows.verdicts(statuses) == {None: 2, "refused": 1}
