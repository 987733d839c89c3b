"""Folders as the published sets have them, saved here with pictures of our own."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ip2p_ray.edit_sets import inputs, read_edits
from ip2p_ray.errors import DatasetError
from ip2p_ray.images import encode_png


def png(shade):
    return encode_png(Image.new("RGB", (8, 8), (shade, 0, 0)))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def magic_brush(tmp_path):
    """The test split as it is unpacked: two sessions, of two turns and of one."""
    root = tmp_path / "test"
    sessions, captions = {}, {}
    for session, turns in (("139", 2), ("30", 1)):
        names = [f"{session}-input.png", *(f"{session}-output{k + 1}.png" for k in range(turns))]
        for shade, name in enumerate(names):
            write(root / "images" / session / name, png(shade))
        sessions[session] = [
            {
                "input": names[k],
                "mask": f"{session}-mask{k + 1}.png",
                "output": names[k + 1],
                "instruction": f"do {k + 1} to {session}",
            }
            for k in range(turns)
        ]
        captions[session] = {name: f"caption of {name}" for name in names}
    write(root / "edit_sessions.json", sessions)
    write(root / "global_descriptions.json", captions)
    return root


def test_turns_of_magic_brush_stand_alone(magic_brush):
    found = list(read_edits(magic_brush))
    assert [(asked.place, asked.group) for asked in found] == [
        ("139/1", "139"),
        ("139/2", "139"),
        ("30/1", "30"),
    ]
    second = found[1]
    assert second.instructions == ("do 2 to 139",)
    assert second.source.read_bytes() == png(1)
    assert second.truth.read_bytes() == png(2)
    assert second.caption == "caption of 139-output1.png"
    assert second.edited_caption == "caption of 139-output2.png"


def test_or_follow_one_another(magic_brush):
    first, second = read_edits(magic_brush, turns="multi")
    assert first.place == "139"
    assert first.instructions == ("do 1 to 139", "do 2 to 139")
    assert first.source.read_bytes() == png(0)
    assert first.truth.read_bytes() == png(2)
    assert first.caption == "caption of 139-input.png"
    assert first.edited_caption == "caption of 139-output2.png"
    assert second.instructions == ("do 1 to 30",)


def test_magic_brush_without_captions_has_none(magic_brush):
    (magic_brush / "global_descriptions.json").unlink()
    assert {asked.edited_caption for asked in read_edits(magic_brush)} == {None}


def test_a_turn_without_its_picture_is_named(magic_brush):
    sessions = json.loads((magic_brush / "edit_sessions.json").read_text())
    del sessions["30"][0]["output"]
    write(magic_brush / "edit_sessions.json", sessions)
    with pytest.raises(DatasetError, match="turn 1 of 30 has no output"):
        list(read_edits(magic_brush))


def image_column(values):
    return pa.array([{"bytes": value, "path": None} for value in values])


def magic_brush_table(path, turns):
    """As the hub has it; `turns` are (img_id, turn_index)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "img_id": [session for session, _ in turns],
        "turn_index": pa.array([turn for _, turn in turns], pa.int32()),
        "source_img": image_column([png(turn - 1) for _, turn in turns]),
        "mask_img": image_column([png(99) for _ in turns]),
        "instruction": [f"do {turn} to {session}" for session, turn in turns],
        "target_img": image_column([png(turn) for _, turn in turns]),
    }
    pq.write_table(pa.table(columns), path)


def test_tables_of_magic_brush_have_turns_too(tmp_path):
    magic_brush_table(tmp_path / "hub" / "data" / "dev-0.parquet", [("7", 2), ("8", 1)])
    magic_brush_table(tmp_path / "hub" / "data" / "dev-1.parquet", [("7", 1)])
    single = list(read_edits(tmp_path / "hub"))
    assert [asked.place for asked in single] == ["img_id=7/2", "img_id=8/1", "img_id=7/1"]
    first, second = read_edits(tmp_path / "hub", turns="multi")
    assert first.instructions == ("do 1 to 7", "do 2 to 7")
    assert (first.source, first.truth) == (png(0), png(2))
    assert second.instructions == ("do 1 to 8",)
    assert inputs(tmp_path / "hub")[0][0] == "hub/data/dev-0.parquet"


def test_a_session_that_lacks_a_turn_is_named(tmp_path):
    magic_brush_table(tmp_path / "dev.parquet", [("7", 1), ("7", 3)])
    with pytest.raises(DatasetError, match="session img_id=7 lacks a turn"):
        list(read_edits(tmp_path / "dev.parquet", turns="multi"))


def test_emu_edit_has_captions_and_types_and_no_truth(tmp_path):
    columns = {
        "instruction": ["make it snow", "add a cat"],
        "image": image_column([png(1), png(1)]),
        "task": ["background", "add"],
        "split": ["test", "test"],
        "idx": [0, 1],
        "hash": ["aa", "aa"],
        "input_caption": ["a house", "a house"],
        "output_caption": ["a house in snow", "a house and a cat"],
    }
    pq.write_table(pa.table(columns), tmp_path / "test.parquet")
    first, second = read_edits(tmp_path)
    assert first.place != second.place
    assert first.group == second.group == "aa"
    assert (first.source, first.truth) == (png(1), None)
    assert (first.caption, first.edited_caption) == ("a house", "a house in snow")
    assert [first.edit_type, second.edit_type] == ["background", "add"]


def pie_entry(**changes):
    return {
        "image_path": "0_random_140/000000000000.jpg",
        "original_prompt": "a [round] cake on a table",
        "editing_prompt": "a [square]  cake on a table",
        "editing_instruction": "make the cake square",
        "editing_type_id": "4",
        "blended_word": "cake cake",
        "mask": [0, 5],
        **changes,
    }


def test_pie_bench_prompts_lose_their_brackets(tmp_path):
    write(tmp_path / "mapping_file.json", {"000000000000": pie_entry()})
    write(tmp_path / "annotation_images" / "0_random_140" / "000000000000.jpg", png(5))
    (asked,) = read_edits(tmp_path)
    assert asked.place == "000000000000"
    assert asked.source.read_bytes() == png(5)
    assert asked.truth is None
    assert asked.caption == "a round cake on a table"
    assert asked.edited_caption == "a square cake on a table"
    assert asked.instructions == ("make the cake square",)
    assert asked.edit_type == "change content"


@pytest.mark.parametrize("blank", [" ", None])
def test_a_blank_instruction_does_not_end_the_set(tmp_path, magic_brush, blank):
    entries = {"7": pie_entry(editing_instruction=blank), "8": pie_entry(original_prompt=blank)}
    write(tmp_path / "pie" / "mapping_file.json", entries)
    first, second = read_edits(tmp_path / "pie")
    assert (first.instructions, second.instructions) == (("",), ("make the cake square",))
    assert (first.caption, second.caption) == ("a round cake on a table", None)
    sessions = json.loads((magic_brush / "edit_sessions.json").read_text())
    sessions["139"][0]["instruction"] = blank
    write(magic_brush / "edit_sessions.json", sessions)
    assert [asked.instructions for asked in read_edits(magic_brush)] == [
        ("",),
        ("do 2 to 139",),
        ("do 1 to 30",),
    ]
    assert next(read_edits(magic_brush, turns="multi")).instructions == ("", "do 2 to 139")


def test_a_row_without_a_picture_does_not_end_the_set(tmp_path):
    texts = {"instruction": ["go", "go"], "input_caption": ["a", "b"], "output_caption": ["c", "d"]}
    columns = {**texts, "image": image_column([None, png(1)])}
    pq.write_table(pa.table(columns), tmp_path / "emu.parquet")
    assert [asked.source for asked in read_edits(tmp_path)] == [None, png(1)]


@pytest.mark.parametrize("below", [".", "original_images", "singleturn"])
def test_img_edit_finds_its_pictures(tmp_path, below):
    edits = {"1082": {"id": "animal/000342021.jpg", "prompt": "make it red", "edit_type": "alter"}}
    write(tmp_path / "basic_edit.json", edits)
    write(tmp_path / below / "animal" / "000342021.jpg", png(3))
    for path in (tmp_path, tmp_path / "basic_edit.json"):
        (asked,) = read_edits(path)
        assert asked.place == "1082"
        assert asked.group == "animal/000342021.jpg"
        assert asked.source.read_bytes() == png(3)
        assert (asked.truth, asked.caption, asked.edit_type) == (None, None, "alter")


def test_any_pairs_will_do(tmp_path):
    rows = [{"input_image": "a.png", "edit_prompt": "go", "edited_image": "b.png"}]
    write(tmp_path / "pairs" / "a.png", png(1))
    (tmp_path / "pairs" / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (asked,) = read_edits(tmp_path / "pairs")
    assert asked.source.read_bytes() == png(1)
    assert asked.truth.name == "b.png"
    assert asked.instructions == ("go",)
    assert asked.group == asked.place == "pairs/rows.jsonl:1"


def test_what_the_reference_generator_left_will_do(tmp_path):
    folder = tmp_path / "set" / "0000001"
    texts = {"caption": "a cat", "edit": "make it a dog", "output": "a dog"}
    write(folder / "prompt.json", texts)
    write(folder / "12_0.jpg", png(1))
    write(folder / "12_1.jpg", png(2))
    (asked,) = read_edits(tmp_path / "set")
    assert (asked.caption, asked.edited_caption) == ("a cat", "a dog")
    assert asked.truth.read_bytes() == png(2)


def test_only_turns_can_be_followed(tmp_path):
    write(tmp_path / "mapping_file.json", {"7": pie_entry()})
    with pytest.raises(DatasetError, match="has no turns that build on one another"):
        read_edits(tmp_path, turns="multi")


@pytest.mark.parametrize("content", ["[]", "{", '{"7": "text"}'])
def test_a_broken_list_is_named(tmp_path, content):
    (tmp_path / "basic_edit.json").write_text(content)
    with pytest.raises(DatasetError, match=r"basic_edit\.json"):
        list(read_edits(tmp_path))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        read_edits(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty"):
        list(read_edits(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"original_prompt": 7}, "7: original_prompt is no text: 7"),
        ({"editing_instruction": ["go"]}, r"7: editing_instruction is no text: \['go'\]"),
        ({"editing_type_id": [4]}, r"7: editing_type_id is no whole number: \[4\]"),
        ({"image_path": 3}, "7 has no image_path"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_file(tmp_path, changes, told):
    write(tmp_path / "mapping_file.json", {"7": pie_entry(**changes)})
    with pytest.raises(DatasetError, match=rf"mapping_file\.json: {told}"):
        list(read_edits(tmp_path))


def test_an_entry_that_is_a_list_is_named(tmp_path):
    write(tmp_path / "mapping_file.json", {"7": [pie_entry()]})
    with pytest.raises(DatasetError, match=r"mapping_file\.json: 7 does not hold the fields of a"):
        list(read_edits(tmp_path))


@pytest.mark.parametrize(
    ("captions", "told"),
    [
        (["a caption"], "139 does not hold captions by their files, but"),
        ({"139-input.png": 5}, r"139: 139-input\.png is no text: 5"),
    ],
)
def test_captions_of_another_kind_are_named(magic_brush, captions, told):
    write(magic_brush / "global_descriptions.json", {"139": captions})
    with pytest.raises(DatasetError, match=rf"global_descriptions\.json: {told}"):
        list(read_edits(magic_brush))


def test_a_type_that_is_a_list_is_named(tmp_path):
    write(tmp_path / "basic_edit.json", {"1": {"id": "a", "prompt": "b", "edit_type": ["add"]}})
    with pytest.raises(DatasetError, match=r"basic_edit\.json: 1: edit_type is no text"):
        list(read_edits(tmp_path))


def test_a_caption_that_is_a_number_is_named_in_a_table(tmp_path):
    row = {"input_image": "a.png", "edit_prompt": "go", "edited_image": "b.png", "caption": 7}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DatasetError, match=r"rows\.jsonl:1: caption is no text: 7"):
        list(read_edits(tmp_path))


@pytest.mark.parametrize("value", [None, 1.5, "one", [1]])
def test_a_turn_that_is_no_number_is_named(tmp_path, value):
    turn = {"img_id": "7", "source_img": "a.png", "instruction": "go", "target_img": "b.png"}
    lines = [json.dumps({**turn, "turn_index": number}) for number in (1, value)]
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    for turns in ("single", "multi"):
        with pytest.raises(DatasetError, match=r"dev\.jsonl:2: turn_index is no whole number"):
            list(read_edits(tmp_path, turns=turns))


def test_a_table_without_turns_beside_one_with_them_is_named(tmp_path):
    magic_brush_table(tmp_path / "dev" / "a.parquet", [("7", 1)])
    row = {"input_image": "a.png", "edit_prompt": "go", "edited_image": "b.png"}
    (tmp_path / "dev" / "b.jsonl").write_text(json.dumps(row) + "\n")
    assert len(list(read_edits(tmp_path / "dev"))) == 2
    with pytest.raises(DatasetError, match=r"dev/b\.jsonl:1 is no turn of a session"):
        list(read_edits(tmp_path / "dev", turns="multi"))


def test_a_turn_that_is_there_twice_is_named(tmp_path):
    magic_brush_table(tmp_path / "dev.parquet", [("7", 1), ("7", 1)])
    with pytest.raises(DatasetError, match="session img_id=7 has turn 1 twice"):
        list(read_edits(tmp_path / "dev.parquet", turns="multi"))
