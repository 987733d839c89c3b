"""Prompt files of others are triplets at once."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray import captions
from ip2p_ray.captions import CaptionConfig
from ip2p_ray.errors import DatasetError
from ip2p_ray.triplets import published, reply
from ip2p_ray.triplets.published import TripletFiles
from ip2p_ray.triplets.reply import Triplet

TEXTS = ("a red boat", "make it blue", "a blue boat")
FORMS = [
    ("input", "edit", "output"),
    ("caption", "edit", "output"),
    ("original_prompt", "edit_prompt", "edited_prompt"),
    ("input_text", "edit_instruction", "output_text"),
    ("caption", "instruction", "edited_caption"),
]


@pytest.mark.parametrize("names", FORMS, ids="|".join)
def test_every_published_form_is_recognised(tmp_path, names):
    row = {"url": "u", **dict(zip(names, TEXTS, strict=True)), "edit_object": "boat"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert published.columns_of(path) == names
    [found] = TripletFiles(paths=(path,))
    texts = dict(zip(("caption", "instruction", "edited_caption"), TEXTS, strict=True))
    assert found == {**texts, "source": "a.jsonl"}


def test_image_datasets_are_read_without_their_images(tmp_path):
    path = tmp_path / "train-00000.parquet"
    row = dict(zip(FORMS[2], TEXTS, strict=True)) | {"original_image": {"bytes": b"x", "path": ""}}
    pq.write_table(pa.Table.from_pylist([row]), path)
    [found] = TripletFiles(paths=(tmp_path,))
    assert found["edited_caption"] == "a blue boat"


@pytest.mark.parametrize(
    "names", [["caption", "url"], ["instruction"], ["input", "output"], ["edit", "output"], []]
)
def test_other_files_are_not(names):
    assert published.triplet_columns(names) is None


def test_a_file_without_the_columns_is_told_what_it_has(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("source_img,instruction\n")
    with pytest.raises(DatasetError, match=r"a\.csv is no file of triplets: it has source_img, in"):
        list(TripletFiles(paths=(path,)))


def row(caption, instruction, edited_caption):
    return {"caption": caption, "instruction": instruction, "edited_caption": edited_caption}


def test_rows_become_triplets_or_have_a_reason():
    rows = [
        row(" a red\nboat", "make it  blue ", "a &quot;blue&quot; boat"),
        row("a red boat", "Make it green", None),
        row("a red boat", None, "a green boat"),
        row("a red boat", 7, "a green boat"),
        row(None, "x", "y"),
        row("a red boat", "make it red", "A red boat!"),
        row("a {{thing}}", "make it red", "a red thing"),
        row("a red boat", "say\n%%\n it", "a boat"),
        row("a red boat", "make it blue", "a blue ship"),
        row("a red boat", "no boat", "sea " * 90),
    ]
    found = list(published.collect(rows))
    assert len(found) == len(rows)
    assert found[0] == (Triplet("a red boat", "make it blue", 'a "blue" boat'), None) or (
        found[8][1] is None
    )
    reasons = [reason for _, reason in found]
    assert sorted(map(str, (reasons[0], reasons[8]))) == ["None", reply.DUPLICATE]
    assert reasons[1:8] == [
        reply.EMPTY_EDITED_CAPTION,
        reply.EMPTY_INSTRUCTION,
        captions.NOT_TEXT,
        captions.EMPTY,
        reply.UNCHANGED_CAPTION,
        captions.MARKUP,
        None,
    ]
    assert reasons[9] == reply.TOO_MANY_TOKENS


def test_one_caption_may_have_many_edits_and_the_order_does_not_matter():
    rows = [row("a boat", f"make it {n}", f"a boat {n}") for n in range(40)]
    rows += [row("a boat", f"make it {n}", f"a ship {n}") for n in range(40)]
    config = CaptionConfig(sample=10, seed=5)
    kept, again = (
        {triplet for triplet, reason in published.collect(order, config) if reason is None}
        for order in (rows, rows[::-1])
    )
    assert kept == again
    assert len(kept) == 10
    assert len({triplet.instruction for triplet in kept}) == 10


def test_the_language_of_the_caption_counts():
    rows = [row("Ein Hund mit einem Ball auf der Wiese", "make it night", "Ein Hund bei Nacht")]
    [(_, reason)] = published.collect(rows, CaptionConfig(language="en"))
    assert reason == captions.WRONG_LANGUAGE


def test_instructions_that_differ_in_case_are_one():
    row = {"caption": "a red boat", "edited_caption": "a blue boat"}
    rows = [{**row, "instruction": text} for text in ("make it blue", "Make it blue")]
    assert {reason for _, reason in published.collect(rows)} == {None, reply.DUPLICATE}
