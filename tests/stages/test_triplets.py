import pyarrow as pa
import pytest

from ip2p_ray import storage
from ip2p_ray.errors import StageError
from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.scores import random_captions
from ip2p_ray.schema import CAPTIONS, REJECTS, TRIPLETS, caption_key, split_of, triplet_key
from ip2p_ray.stages import run
from ip2p_ray.stages.captions import collect_captions
from ip2p_ray.stages.triplets import REPLIES, TripletConfig, WriteReplies, write_triplets

pytestmark = pytest.mark.ray


def test_captions_are_a_dataset(made):
    rows = storage.read_dataset(made.uri("captions"), CAPTIONS).to_pylist()
    assert [row["caption"] for row in rows] == random_captions(made.captions, 0)


def test_captions_that_cannot_be_used_are_counted(tmp_path):
    captions = ["a red boat at sea", "", "a red boat at sea"]
    manifest = collect_captions(captions, str(tmp_path / "captions"), config={})
    assert manifest.rows == 1
    assert manifest.reports[0]["rejected"] == {"empty_caption": 1, "duplicate_caption": 1}


def test_the_writer_is_asked_once_for_every_caption(made):
    rows = storage.read_dataset(made.uri("replies"), REPLIES).to_pylist()
    assert sorted(row["caption"] for row in rows) == sorted(random_captions(made.captions, 0))
    assert all((row["status"] == "ok") == (row["instruction"] is not None) for row in rows)


def test_triplets_are_true_edits_with_keys_of_their_texts(made):
    rows = storage.read_dataset(made.uri("triplets"), TRIPLETS).to_pylist()
    assert len(rows) >= 8
    known = set(random_captions(8, 0))
    for row in rows:
        texts = (row["caption"], row["instruction"], row["edited_caption"])
        assert row["triplet_key"] == triplet_key(*texts)
        assert row["caption_key"] == caption_key(row["caption"])
        assert row["split"] == split_of(row["triplet_key"])
        assert row["caption"] not in known or grammar.is_true_edit(*texts)


def test_every_reply_is_a_triplet_or_a_reject_with_its_reason(made):
    rejects = storage.read_dataset(made.uri("rejects/triplets"), REJECTS).to_pylist()
    manifest = storage.read_manifest(made.uri("triplets"))
    report = manifest.reports[0]
    assert report["rows_in"] == made.captions
    assert report["rows_out"] == manifest.rows
    assert sum(report["rejected"].values()) == len(rejects)
    assert {row["reason"] for row in rejects} == set(report["rejected"])
    assert manifest.models["writer"]


def test_a_reply_does_not_depend_on_its_neighbours(made):
    actor = WriteReplies(made.preset.writer, made.preset.judge, seed=0)
    captions = storage.read_dataset(made.uri("captions"), CAPTIONS)
    stored = {
        row["caption"]: row["reply"]
        for row in storage.read_dataset(made.uri("replies"), REPLIES).to_pylist()
    }
    for start in (0, 5):
        for row in actor(captions.slice(start, 1)).to_pylist():
            assert row["reply"] == stored[row["caption"]]


def test_no_usable_reply_fails_the_stage_with_the_reasons(made, tmp_path):
    """One reply stands already in the folder, so that no writer has to be asked."""
    captions, folder = str(tmp_path / "captions"), str(tmp_path)
    collect_captions(["a red boat at sea"], captions, config={})
    models = {"writer": "w", "judge": "j"}
    asked = run.Origin(
        dataset="replies",
        config={"seed": 0},
        models=models,
        sources={"captions": storage.read_manifest(captions).recipe},
    )
    reply = {
        "caption_key": caption_key("a red boat at sea"),
        "caption": "a red boat at sea",
        "reply": "what?",
        "status": "unfinished",
    }
    replies = f"{folder}/replies"
    table = pa.Table.from_pylist([reply], schema=REPLIES)
    run.make(replies, asked, lambda: storage.write_shard(replies, "r-0", table) or [])
    with pytest.raises(StageError, match=r"no reply was usable.*unfinished 1"):
        write_triplets(
            captions,
            folder,
            TripletConfig(),
            writer="w",
            judge="j",
            models=models,
            resources=run.Resources(),
        )
