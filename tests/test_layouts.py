"""Rows of every layout that people have, read from files made here."""

import csv
import gzip
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray.errors import DatasetError
from ip2p_ray.layouts import PairColumns, PairFiles

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read(*paths):
    return list(PairFiles(paths=paths))


def table(path, columns, rows):
    """A Parquet file whose columns of pictures are structs."""
    fields = [(name, IMAGE if "im" in name else pa.string()) for name in columns]
    content = [dict(zip(columns, row, strict=True)) for row in rows]
    pq.write_table(pa.Table.from_pylist(content, schema=pa.schema(fields)), path)
    return path


def inside(data):
    return {"bytes": data, "path": "x.png"}


def test_the_published_five_columns(tmp_path):
    columns = (
        *("original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image"),
    )
    rows = [("a cat", inside(b"1"), "make it a dog", "a dog", inside(b"2"))]
    path = table(tmp_path / "train-0.parquet", columns, rows * 20)
    found = read(path)
    assert len(found) == 20
    assert found[0].place == "train-0.parquet:1"
    assert found[19].place == "train-0.parquet:20"
    assert (found[0].source, found[0].edited) == (b"1", b"2")
    texts = (found[0].caption, found[0].instruction, found[0].edited_caption)
    assert texts == ("a cat", "make it a dog", "a dog")


def test_three_columns_without_captions(tmp_path):
    path = tmp_path / "a.parquet"
    table(
        path, ("input_image", "edit_prompt", "edited_image"), [(inside(b"1"), "do", inside(b"2"))]
    )
    [found] = read(path)
    assert (found.source, found.edited, found.instruction) == (b"1", b"2", "do")
    assert (found.caption, found.edited_caption, found.group) == (None, None, None)


def test_magicbrush_without_its_masks(tmp_path):
    columns = ("img_id", "turn_index", "source_img", "mask_img", "instruction", "target_img")
    schema = pa.schema(
        [("img_id", pa.string()), ("turn_index", pa.int32())]
        + [(name, IMAGE) for name in ("source_img", "mask_img")]
        + [("instruction", pa.string()), ("target_img", IMAGE)]
    )
    rows = [("7", 1, inside(b"1"), inside(b"mask"), "add a hat", inside(b"2"))]
    content = [dict(zip(columns, row, strict=True)) for row in rows]
    pq.write_table(pa.Table.from_pylist(content, schema=schema), tmp_path / "train.parquet")
    [found] = read(tmp_path / "train.parquet")
    assert (found.source, found.edited, found.group) == (b"1", b"2", "img_id=7")


def test_pictures_as_bytes_and_as_paths(tmp_path):
    names = ("source_image", "instruction", "edited_image")
    plain = pa.table({names[0]: [b"1"], names[1]: ["do"], names[2]: ["sub/2.png"]})
    pq.write_table(plain, tmp_path / "a.parquet")
    [found] = read(tmp_path / "a.parquet")
    assert (found.source, found.edited) == (b"1", tmp_path / "sub" / "2.png")
    rows = [({"bytes": None, "path": "1.png"}, "do", None)]
    [found] = read(table(tmp_path / "b.parquet", names, rows))
    assert (found.source, found.edited) == (tmp_path / "1.png", None)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_whose_rows_differ(tmp_path, name):
    rows = [
        {"source_image": "1.png", "instruction": "do", "edited_image": "2.png"},
        {"input_image": "3.png", "edit": "undo", "edited_image": "4.png", "caption": "a cat"},
        {"instruction": 5},
    ]
    text = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    first, second, third = read(tmp_path / name)
    assert (first.source, first.instruction) == (tmp_path / "1.png", "do")
    assert (second.source, second.instruction) == (tmp_path / "3.png", "undo")
    assert second.caption == "a cat"
    assert (third.source, third.edited, third.instruction) == (None, None, 5)
    assert third.place == f"{name}:3"


def test_csv_and_tsv_in_one_folder_and_nothing_else_of_it(tmp_path):
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.csv").write_text("source_image,instruction,edited_image\n1.png,do,2.png\n")
    (folder / "deep" / "b.tsv").write_text("original_image\tedit\tedited_image\n3.png\tun\t\n")
    (folder / "readme.txt").write_text("no pairs\n")
    first, second = read(folder)
    assert first.place == "mine/a.csv:2"
    assert first.edited == folder / "2.png"
    assert second.place == "mine/deep/b.tsv:2"
    assert (second.source, second.edited) == (folder / "deep" / "3.png", None)
    assert PairFiles(paths=(folder,)).inputs() == [["mine/a.csv", 53], ["mine/deep/b.tsv", 43]]


def prompts(root, name="0000007", seeds=(11, 12), **texts):
    folder = root / name
    folder.mkdir(parents=True)
    texts = texts or {"input": "a cat", "edit": "make it a dog", "output": "a dog"}
    (folder / "prompt.json").write_text(json.dumps(texts))
    for seed in seeds:
        (folder / f"{seed}_0.jpg").write_bytes(b"1")
        (folder / f"{seed}_1.jpg").write_bytes(b"2")
    return folder


def test_the_references_layout_without_a_list_of_seeds(tmp_path):
    root = tmp_path / "root"
    folder = prompts(root)
    prompts(root, "0000002", [5], caption="a", edit="b", output="c")
    prompts(root, "0000003", [])
    metadata = {"seed": 11, "p2p_threshold": 0.5, "cfg_scale": 9.0, "clip_sim_dir": 0.3}
    metadata |= {"clip_sim_0": 0.25, "clip_sim_1": 0.26, "clip_sim_image": 0.8}
    (folder / "metadata.jsonl").write_text(f"{json.dumps(metadata)}\nnot json\n[]\n")
    found = read(root)
    assert [row.place for row in found] == [
        "root/0000002/5",
        "root/0000007/11",
        "root/0000007/12",
    ]
    assert (found[0].caption, found[0].instruction, found[0].edited_caption) == ("a", "b", "c")
    assert (found[1].source, found[1].edited) == (folder / "11_0.jpg", folder / "11_1.jpg")
    assert found[1].made_with == {
        "seed": 11,
        "self_replace": 0.5,
        "guidance_scale": 9.0,
        "caption_similarity": 0.25,
        "edited_caption_similarity": 0.26,
        "image_similarity": 0.8,
        "direction_similarity": 0.3,
    }
    assert found[2].made_with == {"seed": 12}
    assert PairFiles(paths=(root,)).inputs() == [["root", 2, 3]]


def test_the_references_list_of_seeds_says_which_there_are(tmp_path):
    prompts(tmp_path / "shard-00")
    listed = [["shard-00/0000007", [12, 99]], ["shard-00/none", [1]]]
    (tmp_path / "seeds.json").write_text(json.dumps(listed))
    found = read(tmp_path)
    name = tmp_path.name
    assert [row.place for row in found] == [
        f"{name}/shard-00/0000007/12",
        f"{name}/shard-00/0000007/99",
        f"{name}/shard-00/none/1",
    ]
    assert found[1].source.name == "99_0.jpg"
    assert found[2].instruction is None


def test_seeds_in_the_metadata_as_people_write_them(tmp_path):
    folder = prompts(tmp_path / "root", seeds=(1, 2, 3, 4))
    lines = [
        '{"seed": 1, "clip_sim_0": 0.1}',
        '{"seed": 1.5, "clip_sim_0": 0.2}',
        '{"seed": 2.0, "clip_sim_0": 0.3}',
        '{"seed": 3.5, "clip_sim_0": 0.4}',
        '{"seed": "4", "clip_sim_0": NaN}',
        *('{"seed": Infinity}', '{"seed": NaN}', "[" * 100_000, '{"clip_sim_0": 0.5}'),
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = [row.made_with for row in read(tmp_path / "root")]
    assert [row["seed"] for row in found] == [1, 2, 3.5, 4]
    assert [row["caption_similarity"] for row in found[:3]] == [0.1, 0.3, 0.4]
    assert math.isnan(found[3]["caption_similarity"])


def test_a_line_that_cannot_be_read_is_a_row_that_says_why(tmp_path):
    good = {"source_image": "1.png", "instruction": "do", "edited_image": "2.png"}
    lines = [json.dumps(good), '{"source_image": broken', "[7]", json.dumps(good)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read(tmp_path / "a.jsonl")
    assert [row.place for row in found] == [f"a.jsonl:{line}" for line in (1, 2, 3, 4)]
    assert found[0].unread is found[3].unread is None
    assert "a.jsonl:2: not a line of JSON" in found[1].unread
    assert "neither an object nor a text: [7]" in found[2].unread
    huge = "x" * (csv.field_size_limit() + 1)
    rows = ["source_image,instruction,edited_image", "1,a,2", f'3,"{huge}",4', "5,b,6"]
    (tmp_path / "b.csv").write_text("\n".join(rows))
    first, broken, last = read(tmp_path / "b.csv")
    assert "field larger than field limit" in broken.unread
    assert (first.instruction, broken.instruction, last.instruction) == ("a", None, "b")


@pytest.mark.parametrize(
    "content",
    ["{", "7", '[["a", 7]]', '[["a", ["x"]]]', '[["a", [1.5]]]', '[["a", [Infinity]]]'],
)
def test_a_broken_list_of_seeds_is_named(tmp_path, content):
    (tmp_path / "seeds.json").write_text(content)
    with pytest.raises(DatasetError, match=r"seeds\.json does not hold"):
        PairFiles(paths=(tmp_path,)).inputs()


def test_a_table_that_holds_no_pairs_says_what_it_has(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("caption,url\na cat,u\n")
    with pytest.raises(DatasetError, match=r"a\.csv holds no pairs: it has caption, url, not one"):
        PairFiles(paths=(path,)).inputs()
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("text\n")
    with pytest.raises(DatasetError, match="holds no table"):
        PairFiles(paths=(empty,)).inputs()
    numbers = pa.table({"source_image": [1], "instruction": ["do"], "edited_image": [b"2"]})
    pq.write_table(numbers, tmp_path / "n.parquet")
    with pytest.raises(DatasetError, match="column source_image is int64; pictures are bytes"):
        PairFiles(paths=(tmp_path / "n.parquet",)).inputs()
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "n.parquet").read_bytes()[:40])
    with pytest.raises(DatasetError, match=r"cut\.parquet cannot be read"):
        PairFiles(paths=(tmp_path / "cut.parquet",)).inputs()


def test_the_first_known_name_counts():
    names = ["edited_image", "original_image", "source_image", "edit", "output_text", "input"]
    assert PairColumns.of(names) == PairColumns(
        source="source_image",
        instruction="edit",
        edited="edited_image",
        caption="input",
        edited_caption="output_text",
        group=None,
    )
    assert PairColumns.of(["source_image", "edited_image"]) is None
