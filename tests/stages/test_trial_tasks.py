import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError, DatasetError, StageError
from ip2p_ray.images import decode_image, encode_png, to_pil
from ip2p_ray.miniature import scores
from ip2p_ray.miniature.scenes import draw
from ip2p_ray.schema import PAIRS
from ip2p_ray.stages.trial_tasks import DRAWN, TaskSource, make_tasks
from ip2p_ray.trials import TASKS


def made(source, folder):
    make_tasks(source, str(folder))
    return storage.read_dataset(f"{folder}/tasks", TASKS).sort_by("number").to_pylist()


def png(shade, size=(8, 8)):
    return encode_png(Image.new("RGB", size, (shade, 0, 0)))


def img_edit(root, count, group=lambda number: number):
    edits = {
        f"{number:04d}": {
            "id": f"set/{group(number)}.png",
            "prompt": f"do {number}",
            "edit_type": "add",
        }
        for number in range(count)
    }
    (root / "set").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (root / "set" / f"{group(number)}.png").write_bytes(png(group(number)))
    (root / "basic_edit.json").write_text(json.dumps(edits))
    return str(root)


def test_drawn_tasks_are_those_of_the_oracle(tmp_path):
    rows = made(TaskSource(data=DRAWN, tasks=4, seed=3), tmp_path)
    for row, task in zip(rows, scores.edit_tasks(4, 3), strict=True):
        assert row["instructions"] == [task.instruction]
        assert row["edit_type"] == task.edit.type
        truth = to_pil(draw(task.edit.edited))
        assert decode_image(row["edited_image"]["bytes"]).tobytes() == truth.tobytes()
    assert len({row["task_key"] for row in rows}) == 4
    assert rows[1]["another_image"] == rows[0]["source_image"]
    assert rows[0]["another_image"] == rows[1]["source_image"]


def test_another_picture_is_of_another_group(tmp_path):
    data = img_edit(tmp_path / "set", 5, group=lambda number: number // 2)
    rows = sorted(made(TaskSource(data=data), tmp_path), key=lambda row: row["place"])
    others = [decode_image(row["another_image"]["bytes"]).getpixel((0, 0))[0] for row in rows]
    assert others == [1, 1, 0, 0, 1]


def test_a_file_in_a_bucket_is_a_set_as_the_same_file_here(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("IP2P_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "set"
    img_edit(data, 3)
    columns = {"source_img": [png(1)], "target_img": [png(2)], "instruction": ["do it"]}
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "tables" / "edits.parquet")
    storage.upload(data, f"{bucket}/set")
    storage.upload(tmp_path / "tables", f"{bucket}/tables")
    for name in ("set/basic_edit.json", "tables/edits.parquet"):
        here = made(TaskSource(data=str(tmp_path / name)), tmp_path / "here" / name)
        there = made(TaskSource(data=f"{bucket}/{name}"), tmp_path / "there" / name)
        assert len(here) > 0
        assert there == here


def test_of_one_picture_there_is_no_other(tmp_path):
    data = img_edit(tmp_path / "set", 2, group=lambda _: 0)
    rows = made(TaskSource(data=data), tmp_path)
    assert [row["another_image"] for row in rows] == [None, None]


def test_fewer_tasks_are_among_more_and_drawn_from_all(tmp_path):
    data = img_edit(tmp_path / "set", 40)
    few, more = (
        {
            row["place"]: row["number"]
            for row in made(TaskSource(data=data, tasks=n), tmp_path / name)
        }
        for n, name in ((5, "five"), (20, "twenty"))
    )
    assert few.items() <= more.items()
    assert sorted(few.values()) == list(range(5))
    assert max(few) > "0010"
    other = made(TaskSource(data=data, tasks=5, seed=1), tmp_path / "other")
    assert {row["place"] for row in other} != set(few)


def test_held_out_pairs_are_tasks(tmp_path):
    texts = {"caption": "a cat", "instruction": "make it a dog", "edited_caption": "a dog"}
    rows = [
        {
            **dict.fromkeys(PAIRS.names),
            **texts,
            "pair_key": f"pair-{number}",
            "triplet_key": f"triplet-{number // 2}",
            "split": split,
            "source_image": {"bytes": png(number), "path": None},
            "edited_image": {"bytes": png(100 + number), "path": None},
        }
        for number, split in enumerate(["train", "held_out", "held_out", "held_out"])
    ]
    uri = str(tmp_path / "pairs")
    storage.write_shard(uri, "all", pa.Table.from_pylist(rows, schema=PAIRS))
    storage.write_manifest(uri, storage.Manifest(dataset="pairs", recipe="r"))
    found = made(TaskSource(data=uri), tmp_path)
    assert {row["place"]: row["group"] for row in found} == {
        "pair-1": "triplet-0",
        "pair-2": "triplet-1",
        "pair-3": "triplet-1",
    }
    (first,) = [row for row in found if row["place"] == "pair-1"]
    assert first["edited_image"]["bytes"] == png(101)
    assert first["caption"] == "a cat"

    only = pa.Table.from_pylist(rows[:1], schema=PAIRS)
    storage.write_shard(str(tmp_path / "train"), "all", only)
    storage.write_manifest(tmp_path / "train", storage.Manifest(dataset="pairs"))
    with pytest.raises(StageError, match="there is no held-out pair"):
        make_tasks(TaskSource(data=str(tmp_path / "train")), str(tmp_path / "of_train"))


def test_unusable_tasks_are_dropped_and_too_many_end_it(tmp_path):
    data = img_edit(tmp_path / "set", 25)
    (tmp_path / "set" / "set" / "7.png").write_bytes(b"no picture")
    manifest = make_tasks(TaskSource(data=data), str(tmp_path))
    assert manifest.rows == 24
    assert manifest.reports[0]["rejected"] == {"image_broken": 1}
    (tmp_path / "set" / "set" / "8.png").unlink()
    with pytest.raises(StageError, match=r"2 of 25 tasks .* unusable"):
        make_tasks(TaskSource(data=data, tasks=25), str(tmp_path / "again"))


def test_a_blank_instruction_and_a_lacking_picture_are_dropped_and_counted(tmp_path):
    data = tmp_path / "set"
    data.mkdir()
    (data / "a.png").write_bytes(png(1))
    rows = [
        {"input_image": "a.png", "edit_prompt": f"do {number}", "edited_image": "a.png"}
        for number in range(50)
    ]
    rows[3]["edit_prompt"] = " "
    rows[4]["input_image"] = None
    (data / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = make_tasks(TaskSource(data=str(data)), str(tmp_path))
    assert manifest.rows == 48
    assert manifest.reports[0]["rejected"] == {"empty_instruction": 1, "image_missing": 1}


def test_the_same_folder_holds_the_same_tasks(tmp_path):
    data = img_edit(tmp_path / "set", 4)
    first = make_tasks(TaskSource(data=data), str(tmp_path))
    assert make_tasks(TaskSource(data=data), str(tmp_path)) == first
    with pytest.raises(DatasetError, match="seed 0 there, 1 now"):
        make_tasks(TaskSource(data=data, seed=1), str(tmp_path))


def test_what_cannot_be_asked_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tasks is at least 1"):
        TaskSource(data=DRAWN, tasks=0)
    with pytest.raises(ConfigError, match="have to be a number"):
        TaskSource(data=DRAWN)
    with pytest.raises(ConfigError, match="turns multi"):
        TaskSource(data=DRAWN, tasks=2, turns="multi")
    with pytest.raises(DatasetError, match="does not exist"):
        make_tasks(TaskSource(data=str(tmp_path / "no")), str(tmp_path))
