"""A folder in the published form, read back by the package that it is written for."""

import io
import json

import pyarrow as pa
import pytest
from PIL import Image

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError, DatasetError, StageError
from ip2p_ray.export import COLUMNS, PUBLISHED
from ip2p_ray.schema import PAIRS
from ip2p_ray.stages import run
from ip2p_ray.stages.export import export_pairs

CONFIG = {"thresholds": {"text": 0.2, "image": 0.7, "direction": 0.2}, "keep": 4}


def picture(colour, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(stream, format=kind)
    return {"bytes": stream.getvalue(), "path": None}


def row_of(number, split):
    row = dict.fromkeys(PAIRS.names)
    row |= {"pair_key": f"{number:032x}", "triplet_key": f"{number:032x}", "split": split}
    row |= {"instruction": f"make it {number}", "recipe": "21b1b8cab09176fc"}
    if number % 2:  # those without captions have none
        row |= {"caption": f"a cat {number}", "edited_caption": f"a dog {number}"}
    row |= {"source_image": picture((number, 0, 0))}
    return row | {"edited_image": picture((255, 255, 255), "JPEG")}


def write_pairs(folder, rows):
    uri = storage.join(folder, "pairs")

    def build():
        for split in ("train", "held_out"):
            own = [row for row in rows if row["split"] == split]
            table = pa.Table.from_pylist(own, schema=PAIRS)
            storage.write_shard(uri, f"{split}-00000", table)
        return []

    run.make(uri, run.Origin(dataset="pairs", config=CONFIG, models={"judge": "abc"}), build)


@pytest.fixture
def made(tmp_path):
    rows = [row_of(number, "held_out" if number == 3 else "train") for number in range(7)]
    write_pairs(str(tmp_path / "made"), rows)
    return str(tmp_path / "made"), str(tmp_path / "published")


@pytest.fixture
def load(tmp_path):
    """`datasets.load_dataset` with a cache of its own."""
    import datasets

    datasets.disable_progress_bars()

    def loaded(*arguments, **options):
        return datasets.load_dataset(*arguments, cache_dir=str(tmp_path / "cache"), **options)

    return loaded


def test_datasets_reads_both_splits_and_decodes_both_pictures(made, load):
    folder, published = made
    assert export_pairs(folder, published).rows == 7
    files = {split: f"{published}/data/{split}-*.parquet" for split in ("train", "held_out")}
    found = load("parquet", data_files=files)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 6, "held_out": 1}
    assert found["train"].column_names == list(COLUMNS)
    row = found["train"][2]
    assert isinstance(row["original_image"], Image.Image)
    assert isinstance(row["edited_image"], Image.Image)
    assert row["original_image"].size == row["edited_image"].size == (24, 16)
    assert row["original_image"].getpixel((5, 5)) == (2, 0, 0)
    assert (row["edit_prompt"], row["original_prompt"]) == ("make it 2", None)
    assert found["held_out"][0]["original_prompt"] == "a cat 3"


def test_the_card_lets_datasets_read_the_folder_itself(made, load):
    folder, published = made
    export_pairs(folder, published)
    found = load(published)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 6, "held_out": 1}
    assert isinstance(found["held_out"][0]["edited_image"], Image.Image)
    text = storage.local_path(f"{published}/README.md").read_text()
    for said in ("7 pairs", "image 0.7", "judge abc", "recipe 21b1b8cab09176fc"):
        assert said in text
    head = text.split("---")[1]
    assert "\nlicense:" not in head
    assert "# license: choose one" in head


def test_without_held_out_pairs_there_is_no_such_split(tmp_path, load):
    write_pairs(str(tmp_path), [row_of(1, "train")])
    export_pairs(str(tmp_path), str(tmp_path / "published"))
    assert list(load(str(tmp_path / "published"))) == ["train"]


def test_the_same_again_is_there_already_and_other_pairs_are_refused(made, tmp_path):
    folder, published = made
    first = export_pairs(folder, published)
    assert export_pairs(folder, published) == first
    other = tmp_path / "other"
    write_pairs(str(other), [row_of(1, "train")])
    manifest = other / "pairs" / storage.MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "recipe": "another"}))
    with pytest.raises(DatasetError, match="made differently"):
        export_pairs(str(other), published)


def test_a_card_that_was_deleted_is_written_again_and_a_changed_one_stays(made):
    folder, published = made
    exported = export_pairs(folder, published)
    card = storage.local_path(f"{published}/README.md")
    text = card.read_text()
    card.unlink()
    assert export_pairs(folder, published) == exported
    assert card.read_text() == text
    card.write_text("license: mine")
    assert export_pairs(folder, published) == exported
    assert card.read_text() == "license: mine"


def test_foreign_files_stay_and_no_pairs_are_told(made, tmp_path):
    folder, published = made
    mine = tmp_path / "published" / "data.parquet"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is not empty"):
        export_pairs(folder, published)
    assert mine.read_bytes() == b"mine"
    write_pairs(str(tmp_path / "empty"), [])
    with pytest.raises(StageError, match="holds no pair"):
        export_pairs(str(tmp_path / "empty"), str(tmp_path / "new"))


def test_what_a_kill_left_is_made_again(made):
    folder, published = made
    export_pairs(folder, published)
    root = storage.local_path(published)
    before = storage.read_dataset(published, PUBLISHED)
    (root / storage.MANIFEST).unlink()
    (root / "data" / "train-00007.parquet").write_bytes(b"cut off")
    assert export_pairs(folder, published).rows == 7
    assert storage.read_dataset(published, PUBLISHED) == before
