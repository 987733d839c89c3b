"""Captions from lists as people have them, cleaned, each dropped one with its reason."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip2p_ray import captions, schema
from ip2p_ray.errors import DatasetError


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A cat\n on a\tmat ", "A cat on a mat"),
        ("Tom &amp; Jerry &quot;at sea&quot;", 'Tom & Jerry "at sea"'),
        ("<b>Red</b> house<br/>at night", "Red house at night"),
        ("a \ud800cat,\x00 a\u200b dog\u2028 and a\u00a0boat", "a cat, a dog and a boat"),
        ("I <3 you, 2 > 1", "I <3 you, 2 > 1"),
        ("\u00c9t\u00e9 \u00e0 la mer", "\u00c9t\u00e9 \u00e0 la mer"),
    ],
)
def test_markup_and_white_space_go(text, cleaned):
    assert captions.clean_caption(text) == (cleaned, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n", captions.EMPTY),
        ("<br>", captions.EMPTY),
        ("12 / 34!", captions.NO_LETTERS),
        ("buy at www.example.org", captions.CONTAINS_URL),
        ("a" * (captions.MAX_CHARACTERS + 1), captions.TOO_LONG),
    ],
)
def test_what_is_no_caption_has_a_reason(text, reason):
    assert captions.clean_caption(text)[1] == reason


@given(st.text())
def test_a_caption_that_is_kept_is_one_line_and_stays_as_it_is(text):
    caption, reason = captions.clean_caption(text)
    if reason is None and "&" not in caption and "<" not in caption:
        assert captions.clean_caption(caption) == (caption, None)
        assert "\n" not in caption
        caption.encode()


def test_equal_texts_and_equal_urls_are_kept_once():
    rows = [
        {"caption": "a cat", "url": "u1"},
        {"caption": " a  cat ", "url": "u2"},
        {"caption": "a dog", "url": "u1"},
        {"caption": "", "url": "u3"},
        {"caption": "a boat", "url": "u3"},
        {"caption": "a house"},
        {"caption": "a tree"},
    ]
    found = list(captions.collect(rows))
    assert [reason for _, reason in found] == [
        None,
        captions.DUPLICATE,
        captions.DUPLICATE_URL,
        captions.EMPTY,
        None,
        None,
        None,
    ]
    row, _ = found[0]
    assert row == {"caption_key": schema.caption_key("a cat"), "caption": "a cat", "url": "u1"}
    assert all(list(row) == schema.CAPTIONS.names for row, _ in found)


def test_a_text_file_has_a_caption_a_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa cat\r\n\n  \nl'\u00e9t\u00e9\n".encode())
    assert [row["caption"] for row in captions.read_captions(path)] == ["a cat", "l'\u00e9t\u00e9"]


def test_json_lines_may_use_any_published_name(tmp_path):
    path = tmp_path / "list.jsonl"
    values = [{name: name, "url": "u"} for name in captions.COLUMNS]
    values += ["a bare caption", {"TEXT": "a cat", "URL": "v"}, {"input": "b\u2028c", "url": 1}]
    path.write_text("\n".join(json.dumps(value, ensure_ascii=False) for value in values))
    rows = list(captions.read_captions(path))
    assert [row["caption"] for row in rows[:-3]] == list(captions.COLUMNS)
    assert rows[-3:] == [
        {"caption": "a bare caption", "url": None},
        {"caption": "a cat", "url": "v"},
        {"caption": "b\u2028c", "url": None},
    ]


@pytest.mark.parametrize("line", ["{", '{"text": "a cat"}', '{"caption": 3}', "7", "null"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "list.jsonl"
    path.write_text('"fine"\n' + line)
    with pytest.raises(DatasetError, match=r"list\.jsonl:2"):
        list(captions.read_captions(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"nothing\.txt cannot be read"):
        list(captions.read_captions(tmp_path / "nothing.txt"))
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DatasetError, match=r"latin\.txt cannot be read"):
        list(captions.read_captions(tmp_path / "latin.txt"))
