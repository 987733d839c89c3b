"""The hand-written triplets are what they should be, and bad files are told by their lines."""

import difflib
import json
import re
from collections import Counter

import pytest

from ip2p_ray.captions import surely_fits
from ip2p_ray.errors import DatasetError
from ip2p_ray.triplets.examples import (
    EXAMPLES,
    KINDS,
    Example,
    count_kinds,
    load_examples,
    read_examples,
    repeated_captions,
)
from ip2p_ray.triplets.reply import Triplet, normal

# What Prompt-to-Prompt cannot do, by the words an instruction would ask for it with.
IMPOSSIBLE = re.compile(
    r"\b(zoom|camera|angle|viewpoint|perspective|rotate|mirror|flip|closer|crop|wider|pan"
    r"|left|right|swap places|switch places|trade places|positions?"
    r"|write|text|letters?|says?|sign|caption|logo|words?)\b",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def examples():
    return read_examples()


@pytest.fixture(scope="module")
def triplets():
    return load_examples()


def test_there_are_enough_of_every_kind(examples):
    counts = count_kinds(examples)
    assert len(examples) >= 220
    assert sum(counts.values()) == len(examples)
    assert {kind: count for kind, count in counts.items() if count < 8} == {}


def test_no_caption_comes_twice(examples):
    assert repeated_captions(examples) == []


def test_few_instructions_come_twice(triplets):
    counts = Counter(triplet.instruction.lower() for triplet in triplets)
    assert max(counts.values()) <= 2


def test_edited_captions_differ_and_every_text_fits(triplets):
    for triplet in triplets:
        assert normal(triplet.edited_caption) != normal(triplet.caption)
        assert all(map(surely_fits, vars(triplet).values()))


def test_edits_keep_what_they_do_not_change(triplets):
    """Letters in order that caption and edited caption share: unrelated ones have about 0.4."""
    alike = {
        triplet: difflib.SequenceMatcher(
            None, triplet.caption.lower(), triplet.edited_caption.lower()
        ).ratio()
        for triplet in triplets
    }
    assert [triplet for triplet, ratio in alike.items() if ratio < 0.45] == []
    assert sum(alike.values()) / len(alike) > 0.75


def test_no_edit_moves_the_camera_swaps_places_or_writes(triplets):
    assert [t.instruction for t in triplets if IMPOSSIBLE.search(t.instruction)] == []


def test_they_are_as_people_type(triplets):
    texts = [text for t in triplets for text in vars(t).values()]
    assert all(text == text.strip() and text.isascii() for text in texts)
    lengths = [len(triplet.caption.split()) for triplet in triplets]
    assert min(lengths) <= 3
    assert max(lengths) >= 20
    openings = Counter(triplet.instruction.split()[0].lower() for triplet in triplets)
    assert len(openings) >= 30
    assert openings["make"] < len(triplets) / 2


def test_the_file_names_the_three_texts_and_a_kind():
    lines = EXAMPLES.read_text(encoding="utf-8").splitlines()
    names = {tuple(json.loads(line)) for line in lines}
    assert names == {("kind", "caption", "instruction", "edited_caption")}


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


FINE = {"input": "a red boat", "edit": "make it blue", "output": "a blue boat"}


def test_own_examples_may_have_any_published_form(tmp_path):
    path = write(tmp_path / "own.jsonl", FINE, {**FINE, "edit": "blue!", "kind": 3})
    first, second = read_examples(path)
    assert first == Example(Triplet("a red boat", "make it blue", "a blue boat"), None, f"{path}:1")
    assert second.kind is None
    assert load_examples(path)[1].instruction == "blue!"
    table = tmp_path / "own.csv"
    table.write_text("caption,instruction,edited_caption\na red boat,make it blue,a blue boat\n")
    assert load_examples(table) == [first.triplet]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "holds no example|is no file of triplets"),
        ([FINE, {**FINE, "output": "A RED boat."}], r":2: unchanged_caption"),
        ([FINE, {**FINE, "edit": " "}], r":2: empty_instruction"),
        ([FINE, {**FINE, "edit": 3}], r":2: not_text"),
        ([FINE, {"input": "a cat", "edit": "make it a dog"}], r":2: empty_edited_caption"),
        ([{**FINE, "input": ""}], r":1: empty_caption"),
        ([{**FINE, "input": "red boat " * 40}], r":1: (too_many_tokens|caption_too_long)"),
        ([FINE, {**FINE, "edit": "Make it BLUE"}], r":2: the caption and instruction of .*:1"),
        ([{"text": "a cat"}], "is no file of triplets: it has text, not one each of caption, inp"),
    ],
)
def test_a_bad_line_is_named(tmp_path, rows, told):
    with pytest.raises(DatasetError, match=told):
        load_examples(write(tmp_path / "own.jsonl", *rows))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"none\.jsonl cannot be read"):
        load_examples(tmp_path / "none.jsonl")


def test_a_repeated_caption_and_an_unknown_kind_are_told_with_their_lines():
    triplet = Triplet("A cat", "make it a dog", "A dog")
    first = Example(triplet, KINDS[0], "x:1")
    second = Example(Triplet("a CAT", "make it night", "a cat at night"), "moon", "x:2")
    assert repeated_captions([first, second]) == ["x:2: the caption of x:1"]
    with pytest.raises(DatasetError, match=r"x:2: kind is one of style.*got 'moon'"):
        count_kinds([first, second])
