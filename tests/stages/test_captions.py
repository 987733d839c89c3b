"""Files of captions and of triplets become datasets; no Ray is started here."""

import gzip
import json

import pytest

from ip2p_ray import storage
from ip2p_ray.captions import CaptionConfig, CaptionFiles
from ip2p_ray.errors import ConfigError, DatasetError, StageError
from ip2p_ray.schema import (
    CAPTIONS,
    COLLECTED_CAPTIONS,
    REJECTS,
    TRIPLETS,
    caption_key,
    split_of,
    triplet_key,
)
from ip2p_ray.stages import captions
from ip2p_ray.stages.captions import collect_captions, collect_files
from ip2p_ray.triplets.examples import EXAMPLES, load_examples

ROWS = [
    {"TEXT": "a red boat", "URL": "u1"},
    {"TEXT": "a red boat", "URL": "u2"},
    {"TEXT": "<br>", "URL": "u3"},
    {"TEXT": "Ein Hund mit einem Ball auf der Wiese", "URL": "u4"},
    {"TEXT": "a green boat", "URL": None},
]


@pytest.fixture
def given(tmp_path):
    """A folder of two shards."""
    folder = tmp_path / "given"
    folder.mkdir()
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "0.jsonl").write_text("".join(lines[:2]))
    (folder / "1.jsonl.gz").write_bytes(gzip.compress("".join(lines[2:]).encode()))
    return folder


def rows_of(tmp_path, name, schema):
    return storage.read_dataset(tmp_path / name, schema).to_pylist()


def test_captions_of_files_with_their_rejects(given, tmp_path):
    config = CaptionConfig(language="en")
    manifest = collect_files(CaptionFiles(paths=(given,)), str(tmp_path), config)
    assert manifest.rows == 2
    assert manifest.reports[0]["rejected"] == {
        "duplicate_caption": 1,
        "empty_caption": 1,
        "wrong_language": 1,
    }
    kept = rows_of(tmp_path, "captions", COLLECTED_CAPTIONS)
    assert {(row["caption"], row["source"]) for row in kept} == {
        ("a red boat", "0.jsonl"),
        ("a green boat", "1.jsonl.gz"),
    }
    assert all(row["caption_key"] == caption_key(row["caption"]) for row in kept)
    assert {row["url"] for row in kept} < {"u1", "u2", None}
    rejects = rows_of(tmp_path, "rejects/captions", REJECTS)
    assert {(row["reason"], row["detail"]) for row in rejects} == {
        ("duplicate_caption", "a red boat"),
        ("empty_caption", ""),
        ("wrong_language", ROWS[3]["TEXT"]),
    }
    assert {row["stage"] for row in rejects} == {"captions"}


def test_readers_of_captions_need_not_know_of_sources(given, tmp_path):
    collect_files(CaptionFiles(paths=(given,)), str(tmp_path), CaptionConfig())
    assert rows_of(tmp_path, "captions", CAPTIONS)[0]["caption"] == "a red boat"
    collect_captions(["a cat"], str(tmp_path / "listed"), config={})
    assert rows_of(tmp_path, "listed", CAPTIONS) == [
        {"caption_key": caption_key("a cat"), "caption": "a cat", "url": None}
    ]


def test_a_sample_counts_the_others_and_keeps_no_row_of_them(given, tmp_path):
    manifest = collect_files(CaptionFiles(paths=(given,)), str(tmp_path), CaptionConfig(sample=1))
    assert manifest.rows == 1
    assert manifest.reports[0]["rejected"]["not_sampled"] == 2
    reasons = [row["reason"] for row in rows_of(tmp_path, "rejects/captions", REJECTS)]
    assert sorted(reasons) == ["duplicate_caption", "empty_caption"]


@pytest.mark.parametrize(("count", "rows"), [(0, [0]), (2, [2]), (5, [2, 2, 1])])
def test_many_rows_become_many_shards(tmp_path, count, rows):
    shards = captions.Shards(str(tmp_path), "captions", CAPTIONS, shard_rows=2)
    for number in range(count):
        shards.add({"caption": str(number)})
    shards.close()
    manifest = storage.write_manifest(tmp_path, storage.Manifest(dataset="captions"))
    assert [shard.rows for shard in manifest.shards] == rows
    found = storage.read_dataset(tmp_path, CAPTIONS)["caption"].to_pylist()
    assert found == [str(number) for number in range(count)]


def test_what_a_killed_run_left_is_made_again(given, tmp_path):
    rows, config = CaptionFiles(paths=(given,)), CaptionConfig()
    collect_files(rows, str(tmp_path), config)
    first = rows_of(tmp_path, "captions", COLLECTED_CAPTIONS)
    (tmp_path / "captions" / storage.MANIFEST).unlink()
    (tmp_path / "captions" / "captions-00007.parquet").write_bytes(b"cut off")
    assert collect_files(rows, str(tmp_path), config).rows == 3
    assert rows_of(tmp_path, "captions", COLLECTED_CAPTIONS) == first
    assert len(rows_of(tmp_path, "rejects/captions", REJECTS)) == 2


def test_other_files_or_settings_in_the_same_folder_are_refused(given, tmp_path):
    rows = CaptionFiles(paths=(given,))
    collect_files(rows, str(tmp_path), CaptionConfig())
    with pytest.raises(DatasetError, match="sample None there, 1 now"):
        collect_files(rows, str(tmp_path), CaptionConfig(sample=1))
    (given / "2.txt").write_text("a cat\n")
    with pytest.raises(DatasetError, match="made differently"):
        collect_files(rows, str(tmp_path), CaptionConfig())


def test_nothing_to_keep_fails_with_the_reasons(tmp_path):
    (tmp_path / "a.txt").write_text("<br>\n12\n")
    rows = CaptionFiles(paths=(tmp_path / "a.txt",))
    with pytest.raises(StageError, match=r"no row could be kept: captions: kept 0 of 2.*empty_cap"):
        collect_files(rows, str(tmp_path), CaptionConfig())


def test_a_wrong_column_is_told_before_anything_is_made(given, tmp_path):
    rows = CaptionFiles(paths=(given,), column="text")
    with pytest.raises(DatasetError, match=r"0\.jsonl has no column 'text'; it has: TEXT, URL"):
        collect_files(rows, str(tmp_path), CaptionConfig())
    assert not (tmp_path / "captions").exists()


def test_prompt_files_become_triplets(tmp_path):
    config = CaptionConfig(sample=100)
    manifest = collect_files(CaptionFiles(paths=(EXAMPLES,)), str(tmp_path), config, held_out=0.5)
    rows = rows_of(tmp_path, "triplets", TRIPLETS)
    assert manifest.rows == len(rows) == 100
    known = {triplet.key for triplet in load_examples()}
    for row in rows:
        texts = (row["caption"], row["instruction"], row["edited_caption"])
        assert row["triplet_key"] == triplet_key(*texts)
        assert row["triplet_key"] in known
        assert row["caption_key"] == caption_key(row["caption"])
        assert row["split"] == split_of(row["triplet_key"], 0.5)
        assert row["writer"] == "published"


def test_triplets_that_cannot_be_used_are_rejects(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("input,edit,output\na cat,make it a dog,a dog\na cat,nothing,A cat.\n")
    collect_files(CaptionFiles(paths=(path,)), str(tmp_path), CaptionConfig())
    [row] = rows_of(tmp_path, "rejects/triplets", REJECTS)
    assert row["reason"] == "unchanged_caption"
    assert row["detail"] == "a cat\n##\nnothing\n%%\nA cat.\nEND"


def test_a_column_that_is_asked_for_makes_captions_of_prompt_files(given, tmp_path):
    rows = CaptionFiles(paths=(EXAMPLES,), column="edited_caption")
    assert collect_files(rows, str(tmp_path), CaptionConfig()).dataset == "captions"
    with pytest.raises(ConfigError, match=r"examples\.jsonl holds triplets and .*0\.jsonl does no"):
        collect_files(CaptionFiles(paths=(EXAMPLES, given)), str(tmp_path), CaptionConfig())


def test_by_default_a_caption_has_to_fit_openais_clip(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("yesterday " * 30 + "\n" + "yesterday " * 90 + "\n")
    manifest = collect_files(CaptionFiles(paths=(path,)), str(tmp_path), CaptionConfig())
    assert manifest.reports[0]["rejected"] == {"caption_too_long": 1}


def test_long_reads_say_how_far_they_are(caplog):
    caplog.set_level("INFO", logger=captions.logger.name)
    heard = captions.Heard([{}] * 1500, "captions", every_s=-1.0)
    assert [len(list(heard)), len(list(heard))] == [1500, 1500]
    assert caplog.messages == [
        "captions: 1,000 rows, reading 1 of 2",
        "captions: 1,000 rows, reading 2 of 2",
    ]
