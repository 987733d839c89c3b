"""Captions from lists as people have them, cleaned, each dropped one with its reason."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip2p_ray import captions, schema
from ip2p_ray.errors import ConfigError, DatasetError


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A cat\n on a\tmat ", "A cat on a mat"),
        ("Tom &amp; Jerry &quot;at sea&quot;", 'Tom & Jerry "at sea"'),
        ("<b>Red</b> house<br/>at night", "Red house at night"),
        ("a \ud800cat,\x00 a\u200b dog\u2028 and a\u00a0boat", "a cat, a dog and a boat"),
        ("I <3 you, 2 > 1", "I <3 you, 2 > 1"),
        ("\u00c9t\u00e9 \u00e0 la mer", "\u00c9t\u00e9 \u00e0 la mer"),
        (
            "On display: [detail] of an image, 100 % wool",
            "On display: [detail] of an image, 100 % wool",
        ),
        ("Photo of R&B singers; class of 1982", "Photo of R&B singers; class of 1982"),
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
        ("https://example.org/cat.jpg", captions.CONTAINS_URL),
        ('red shoes <img src="shoes.jpg', captions.MARKUP),
        ("cats &amp;amp;amp; dogs", captions.MARKUP),
        ("Buy {{product.title}} now", captions.MARKUP),
        ("{title} by {author}", captions.MARKUP),
        ("Hello ${name}", captions.MARKUP),
        ('[caption id="3" width="200"] A dog', captions.MARKUP),
        ("big%20dog", captions.MARKUP),
        ("Lorem ipsum dolor sit amet", captions.MARKUP),
        ("IMG_2034.JPG", captions.FILE_NAME),
        ("dsc-00123", captions.FILE_NAME),
        ("my-holiday-photo.jpeg", captions.FILE_NAME),
        ("Image", captions.PLACEHOLDER),
        ("No image available.", captions.PLACEHOLDER),
        ("undefined", captions.PLACEHOLDER),
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


def test_bytes_are_texts_and_other_values_are_not():
    assert captions.clean_caption("caf\u00e9".encode()) == ("caf\u00e9", None)
    assert captions.clean_caption(3.5) == ("3.5", captions.NOT_TEXT)
    assert captions.clean_caption(["a cat"])[1] == captions.NOT_TEXT
    assert captions.clean_caption(None) == ("", captions.EMPTY)


def test_equal_texts_and_equal_urls_are_kept_once():
    rows = [
        {"caption": "a cat", "url": "u1"},
        {"caption": " a  cat ", "url": "u1"},
        {"caption": "", "url": "u3"},
        {"caption": "a boat", "url": "u3"},
        {"caption": "a ship", "url": "u3"},
        {"caption": "a house"},
        {"caption": "a tree", "source": "s"},
    ]
    found = list(captions.collect(rows))
    reasons = [reason for _, reason in found]
    assert reasons[:3] == [None, captions.DUPLICATE, captions.EMPTY]
    assert sorted(map(str, reasons[3:5])) == ["None", captions.DUPLICATE_URL]
    assert reasons[5:] == [None, None]
    row, _ = found[0]
    texts = {"caption_key": schema.caption_key("a cat"), "caption": "a cat"}
    assert row == {**texts, "url": "u1", "source": None}
    assert all(list(row) == schema.COLLECTED_CAPTIONS.names for row, _ in found)
    assert found[6][0]["source"] == "s"


def test_the_same_sample_comes_of_any_order_and_sharding():
    rows = [{"caption": f"picture of {n} cats", "url": f"u{n % 90}"} for n in range(100)] * 2
    config = captions.CaptionConfig(sample=30, seed=7)
    orders = (rows, rows[::-1], rows[50:] + rows[:50])
    kept = [
        {
            (row["caption"], row["url"])
            for row, reason in captions.collect(order, config)
            if not reason
        }
        for order in orders
    ]
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) == 30
    reasons = [reason for _, reason in captions.collect(rows, config)]
    assert reasons.count(captions.DUPLICATE) == 100
    assert reasons.count(captions.DUPLICATE_URL) == 10
    assert reasons.count(captions.UNSAMPLED) == 60


def test_what_an_encoder_cannot_read_whole_is_too_long():
    rows = [{"caption": "a cat"}, {"caption": "a much longer cat"}]
    found = captions.collect(rows, fits=lambda text: len(text) < 9)
    assert [reason for _, reason in found] == [None, captions.TOO_LONG]


def test_the_language_is_an_option():
    rows = [{"caption": "Ein Hund mit einem Ball auf der Wiese"}, {"caption": "A dog"}]
    assert [reason for _, reason in captions.collect(rows)] == [None, None]
    config = captions.CaptionConfig(language="en")
    assert [reason for _, reason in captions.collect(rows, config)] == [
        captions.WRONG_LANGUAGE,
        None,
    ]


@pytest.mark.parametrize("changes", [{"sample": 0}, {"seed": -1}, {"language": "de"}])
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError):
        captions.CaptionConfig(**changes)


def test_reasons_are_listed_once_and_in_snake_case():
    assert len(set(captions.REASONS)) == len(captions.REASONS)
    assert all(reason.replace("_", "").islower() for reason in captions.REASONS)


def test_the_count_of_tokens_needs_no_vocabulary():
    assert captions.surely_fits("a red boat " * 15)
    assert captions.surely_fits("1" * 75)
    assert not captions.surely_fits("1" * 76)
    assert not captions.surely_fits("\u732b" * 26)


def test_a_text_file_has_a_caption_a_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa cat\r\n\n  \nl'\u00e9t\u00e9\n".encode())
    assert [row["caption"] for row in captions.read_captions(path)] == ["a cat", "l'\u00e9t\u00e9"]


@pytest.mark.parametrize("name", captions.COLUMNS)
def test_json_lines_may_use_any_published_name(tmp_path, name):
    path = tmp_path / "list.jsonl"
    values = [{name: "a cat", "URL": "u"}, {name: "a dog", "URL": 1}, {"other": "x"}]
    path.write_text("\n".join(map(json.dumps, values)))
    assert list(captions.read_captions(path)) == [
        {"caption": "a cat", "url": "u", "source": "list.jsonl"},
        {"caption": "a dog", "url": None, "source": "list.jsonl"},
        {"caption": None, "url": None, "source": "list.jsonl"},
    ]


def test_any_column_may_hold_the_caption_the_url_and_the_source(tmp_path):
    columns = {"Alt": ["a cat", "a dog"], "Where": ["u1", None], "source": ["laion", ""]}
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({**columns, "From": ["web", "web"]}), path)
    rows = captions.CaptionFiles(paths=(path,), column="Alt", url_column="Where")
    assert list(rows) == list(rows)  # again and again
    assert list(rows) == [
        {"caption": "a cat", "url": "u1", "source": "laion"},
        {"caption": "a dog", "url": None, "source": "list.parquet"},
    ]
    rows = captions.CaptionFiles(paths=(path,), column="Alt", source_column="From")
    assert [row["source"] for row in rows] == ["web", "web"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "none of the columns caption, input, .* it has: Alt, Where; say which"),
        ({"column": "alt"}, "has no column 'alt'; it has: Alt, Where"),
        ({"column": "Alt", "url_column": "url"}, "has no column 'url'; it has: Alt, Where"),
        ({"column": "Alt", "source_column": "s"}, "has no column 's'; it has: Alt, Where"),
    ],
)
def test_a_missing_column_is_told_with_those_there_are(tmp_path, options, told):
    (tmp_path / "a.csv").write_text("Alt,Where\na cat,u\n")
    with pytest.raises(DatasetError, match=told):
        list(captions.CaptionFiles(paths=(tmp_path,), **options))


def test_columns_are_looked_for_before_anything_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("caption\na cat\n")
    (tmp_path / "b.csv").write_text("words\na cat\n")
    with pytest.raises(DatasetError, match=r"b\.csv has none of the columns"):
        next(iter(captions.CaptionFiles(paths=(tmp_path,))))


@pytest.mark.parametrize("line", ["{", "7", "null"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "list.jsonl"
    path.write_text('"fine"\n' + line)
    fine, bad = captions.read_captions(path)
    assert fine["caption"] == "fine"
    text, reason = captions.clean_caption(bad["caption"])
    assert reason == captions.NOT_TEXT
    assert "list.jsonl:2" in text


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"nothing\.txt cannot be read"):
        list(captions.read_captions(tmp_path / "nothing.txt"))
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DatasetError, match=r"latin\.txt cannot be read"):
        list(captions.read_captions(tmp_path / "latin.txt"))


def test_captions_that_differ_in_case_are_one():
    rows = [{"caption": text} for text in ("A red boat", "a red boat", "A RED BOAT", "a red goat")]
    reasons = [reason for _, reason in captions.collect(rows)]
    assert reasons.count(captions.DUPLICATE) == 2
    assert reasons[3] is None


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        (
            "a.jsonl",
            '{"caption": "a red boat"}\n{"caption": \n{"caption": "a cat"}\n',
            "a line of JS",
        ),
        ("a.csv", f'caption\na red boat\n"{"x" * 200_000}"\na cat\n', "field limit"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_reject(tmp_path, name, data, told):
    (tmp_path / name).write_text(data)
    rows = captions.CaptionFiles(paths=(tmp_path / name,))
    found = list(captions.collect(rows))
    assert [reason for _, reason in found] == [None, captions.NOT_TEXT, None]
    assert told in found[1][0]["caption"]
