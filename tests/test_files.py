"""Rows of every kind of file, one batch at a time."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray import files, storage
from ip2p_ray.errors import DatasetError

ROWS = [
    {"caption": "a cat", "url": "u1"},
    {"caption": 'a "big" dog,\nasleep', "url": None},
    {"caption": "l'\u00e9t\u00e9\u2028fin", "url": "u3"},
]


def write(path, text, encoding="utf-8"):
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def write_parquet(path, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_json_lines(path, rows=ROWS):
    return write(path, "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "A.JSONL"])
def test_json_lines(tmp_path, name):
    path = write_json_lines(tmp_path / name)
    assert list(files.read_rows(path)) == ROWS
    assert [number for number, _ in files.read_numbered(path)] == [1, 3, 5]
    assert files.columns(path) == ["caption", "url"]


def test_parquet_reads_only_what_is_asked_for(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    assert files.columns(path) == ["caption", "url"]
    assert list(files.read_rows(path, ["caption", "url"])) == ROWS
    assert list(files.read_numbered(path, ["url"])) == [
        (number, {"url": row["url"]}) for number, row in enumerate(ROWS, start=1)
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_knows_quotes_and_line_breaks_in_them(tmp_path, name):
    text = '\ufeffcaption,url\r\na cat,u1\r\n"a ""big"" dog,\nasleep",\r\n'
    path = write(tmp_path / name, text)
    assert files.columns(path) == ["caption", "url"]
    assert list(files.read_numbered(path)) == [
        (2, {"caption": "a cat", "url": "u1"}),
        (4, {"caption": 'a "big" dog,\nasleep', "url": ""}),
    ]


def test_tsv_takes_quotation_marks_as_they_are(tmp_path):
    path = write(tmp_path / "a.tsv", 'caption\turl\na 6" pipe\tu1\n"so\tu2\n')
    assert [row["caption"] for row in files.read_rows(path)] == ['a 6" pipe', '"so']


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_has_a_row_a_line(tmp_path, name):
    path = write(tmp_path / name, "\ufeffa cat\r\n\n  \na\u2028dog\n")
    assert list(files.read_numbered(path)) == [
        (1, {files.TEXT: "a cat"}),
        (4, {files.TEXT: "a\u2028dog"}),
    ]
    assert files.columns(path) == [files.TEXT]


def test_bare_strings_are_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", '"a cat"\n"a dog"\n')
    assert list(files.read_rows(path)) == [{"text": "a cat"}, {"text": "a dog"}]
    assert files.columns(path) == [files.TEXT]


def test_an_empty_file_has_no_rows(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.csv"):
        path = write(tmp_path / name, "")
        assert list(files.read_rows(path)) == []
        assert files.columns(path) in ([], [files.TEXT])


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.jsonl", b'"fine"\n{', r"a\.jsonl:2: not a line of JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not a line of JSON"),
        ("a.jsonl", b"7", r"a\.jsonl:1: neither an object nor a text: 7"),
        ("a.txt", b"\xff\xfe\xfa", r"a\.txt cannot be read"),
        ("a.csv", b"caption\n" + b"x" * 200_000, r"a\.csv cannot be read.*field limit"),
        ("a.parquet", b"PAR1 no more", r"a\.parquet cannot be read"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-12], r"a\.txt\.gz cannot be read"),
        ("a.docx", b"", r"a\.docx is of no known kind; known are \.parquet, \.jsonl"),
        ("a.parquet.gz", b"", r"a\.parquet\.gz is of no known kind"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, data, told):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=told):
        list(files.read_rows(path))


def test_a_byte_that_is_no_utf_8_costs_no_more_than_its_row(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a red boat\na caf\xe9 table\n")
    texts = [row[files.TEXT] for row in files.read_rows(path)]
    assert texts == ["a red boat", "a caf\ufffd table"]


def test_json_lines_have_the_columns_of_many_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"id": 1}\n{"caption": "a", "id": 2}\n{"url": "u"}\n')
    assert files.columns(path) == ["id", "caption", "url"]


def test_an_empty_file_beside_others_is_left_out(tmp_path):
    write(tmp_path / "a.csv", "caption\na cat\n")
    write(tmp_path / "b.csv", "")
    assert [path.name for path in files.files_of([tmp_path])] == ["a.csv"]


def test_a_folder_stands_for_its_files(tmp_path):
    (tmp_path / "b").mkdir()
    names = ["b/2.parquet", "1.jsonl", "b/10.txt.gz", "_manifest.txt", ".hidden.txt", "README.md"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    found = files.files_of([tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "1.jsonl",
        "b/10.txt.gz",
        "b/2.parquet",
    ]


def test_paths_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"none\.txt cannot be read: there is no such file"):
        files.files_of([tmp_path / "none.txt"])
    with pytest.raises(DatasetError, match="holds no file of"):
        files.files_of([tmp_path])
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(DatasetError, match="no known kind"):
        files.files_of([tmp_path / "a.pdf"])


def test_rows_with_pictures_are_read_a_few_at_a_time(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    for batch in (1, 2, 100):
        rows = files.read_numbered(path, ["caption"], batch=batch)
        assert list(rows) == [(n, {"caption": row["caption"]}) for n, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.csv", "a.txt"])
def test_an_object_reads_as_a_file_does(bucket, tmp_path, name):
    lines = [{"text": f"caption {number} \u00e9"} for number in range(3000)]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(lines), tmp_path / name, row_group_size=700)
    else:
        texts = [json.dumps(row) if "json" in name else row["text"] for row in lines]
        content = "\n".join(["text", *texts] if name == "a.csv" else texts).encode()
        (tmp_path / name).write_bytes(
            gzip.compress(content, mtime=0) if name.endswith("gz") else content
        )
    storage.write_bytes(f"{bucket}/{name}", (tmp_path / name).read_bytes())
    (there,) = storage.files_at(f"{bucket}/{name}")
    assert files.columns(there) == files.columns(tmp_path / name) == ["text"]
    assert list(files.read_numbered(there, ["text"])) == list(
        files.read_numbered(tmp_path / name, ["text"])
    )
    assert list(files.read_rows(there, ["text"])) == lines
    assert files.size(there) == files.size(tmp_path / name) == (tmp_path / name).stat().st_size
    storage.write_bytes(f"{bucket}/{name}", b"\xff\xfe")
    with pytest.raises(DatasetError, match=f"{bucket}/{name} cannot be read"):
        list(files.read_rows(there, ["text"]))


def test_the_objects_below_a_uri_are_those_of_a_folder(bucket):
    for name in ("b.csv", "a/c.txt", "_SUCCESS", ".hidden/a.csv", "a.pdf"):
        storage.write_bytes(f"{bucket}/in/{name}", b"a")
    found = [str(file) for file in files.files_of(storage.files_at(f"{bucket}/in/"))]
    assert found == [f"{bucket}/in/a/c.txt", f"{bucket}/in/b.csv"]
    with pytest.raises(DatasetError, match=r"there is no .*/a\.pdf/b, and no \.parquet, "):
        storage.files_at(f"{bucket}/in/a.pdf/b")
    with pytest.raises(DatasetError, match=r"a\.pdf is of no known kind"):
        files.files_of(storage.files_at(f"{bucket}/in/a.pdf"))
