"""A user's own pairs become a dataset that can be trained on; no Ray is started here."""

import csv
import io
import itertools
import json
import math
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ip2p_ray import storage
from ip2p_ray.clip import Clip
from ip2p_ray.errors import ConfigError, DatasetError, StageError
from ip2p_ray.export import published_table
from ip2p_ray.filtering import Thresholds
from ip2p_ray.images import decode_image
from ip2p_ray.latents import LatentDataset
from ip2p_ray.layouts import PairFiles
from ip2p_ray.miniature.weights import WEIGHTS
from ip2p_ray.own_pairs import OwnPairsConfig, pixel_digest
from ip2p_ray.rules import Rules
from ip2p_ray.schema import LATENTS, PAIRS, REJECTS, SCORES, SIMILARITIES, triplet_key
from ip2p_ray.stages import checked
from ip2p_ray.stages.checked import CHECKED, check_rows
from ip2p_ray.stages.filtering import rejudge_pairs
from ip2p_ray.stages.latents import EncodePairs
from ip2p_ray.stages.own_pairs import OwnPairs, collect_own_pairs
from ip2p_ray.testing import killed_at, tiny_stable_diffusion

CONFIG = OwnPairsConfig(min_side=16)
NAMES = ("source_image", "instruction", "edited_image")


def pixels(seed, size=(32, 32)):
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(levels)


def encoded(seed, kind="PNG", size=(32, 32)):
    stream = io.BytesIO()
    pixels(seed, size).save(stream, format=kind)
    return stream.getvalue()


def write_table(folder, rows, name="pairs.csv", columns=NAMES):
    """A CSV file, and beside it the pictures that its rows give as bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for number, row in enumerate(rows):
            cells = []
            for place, value in enumerate(row):
                if isinstance(value, bytes):
                    path = folder / f"{number}-{place}.bin"
                    path.write_bytes(value)
                    value = path.name
                cells.append(value)
            table.writerow(cells)
    return folder / name


def rows_of(count=12, start=0, **options):
    """Rows of different pictures."""
    return [
        (encoded(2 * number, **options), f"make it {number}", encoded(2 * number + 1, **options))
        for number in range(start, start + count)
    ]


def own(*paths, **options):
    options = {"config": CONFIG, "held_out": 0.3, "max_reject_share": 1.0, **options}
    return OwnPairs(files=PairFiles(paths=paths), **options)


def read(folder, name, schema):
    return storage.read_dataset(storage.join(str(folder), name), schema).to_pylist()


def test_good_rows_become_pairs_and_the_others_rejects_with_their_place(tmp_path):
    good = rows_of(8)
    bad = [
        (encoded(90)[:200], "a", encoded(91)),
        (encoded(90), "a", encoded(91, size=(40, 32))),
        (encoded(90), "", encoded(91)),
        ("nowhere.png", "a", encoded(91)),
        good[0],
    ]
    path = write_table(tmp_path / "mine", good + bad)
    manifest = collect_own_pairs(own(path), str(tmp_path / "out"))
    assert manifest.rows == 8
    assert manifest.reports[0]["rejected"] == {
        "image_broken": 1,
        "sizes_differ": 1,
        "empty_instruction": 1,
        "image_missing": 1,
        "duplicate_pair": 1,
    }
    rejects = {row["key"]: row for row in read(tmp_path / "out", "rejects/pairs", REJECTS)}
    assert rejects["pairs.csv:11"]["reason"] == "sizes_differ"
    assert rejects["pairs.csv:11"]["detail"].startswith("32 x 32 and 40 x 32")
    assert rejects["pairs.csv:14"]["detail"] == "the same as pairs.csv:2"
    pairs = read(tmp_path / "out", "pairs", PAIRS)
    assert {row["instruction"] for row in pairs} == {f"make it {number}" for number in range(8)}
    row = next(row for row in pairs if row["instruction"] == "make it 3")
    assert row["source_image"] == {"bytes": encoded(6), "path": None}
    assert row["edited_image"] == {"bytes": encoded(7), "path": None}
    assert row["writer"] == "own"
    absent = ("caption", "edited_caption", "caption_key", "recipe", "index", "seed")
    assert {row[name] for name in (*absent, *SIMILARITIES)} == {None}
    scores = read(tmp_path / "out", "scores", SCORES)
    assert {row["pair_key"] for row in scores} == {row["pair_key"] for row in pairs}


def test_a_picture_is_never_in_two_splits(tmp_path):
    sources = [encoded(number) for number in range(30)]
    rows = [
        (sources[number % 30], f"step {number}", encoded(1000 + number)) for number in range(90)
    ]
    rows += [(encoded(1000 + number), "go on", encoded(2000 + number)) for number in range(30)]
    collect_own_pairs(own(write_table(tmp_path, rows)), str(tmp_path / "out"))
    pairs = read(tmp_path / "out", "pairs", PAIRS)
    assert len(pairs) == 120
    splits = {}
    for row in pairs:
        for name in ("source_image", "edited_image"):
            splits.setdefault(row[name]["bytes"], set()).add(row["split"])
    assert {len(found) for found in splits.values()} == {1}
    assert {row["split"] for row in pairs} == {"train", "held_out"}
    for split in ("train", "held_out"):
        stored = pq.read_table(tmp_path / "out" / "pairs" / f"{split}-00000.parquet")
        assert set(stored["split"].to_pylist()) == {split}
    scores = {row["pair_key"]: row["split"] for row in read(tmp_path / "out", "scores", SCORES)}
    assert scores == {row["pair_key"]: row["split"] for row in pairs}


def test_rows_of_one_group_or_of_the_same_texts_are_in_one_split(tmp_path):
    columns = (*NAMES, "img_id", "caption", "edited_caption")
    rows = [
        (*row, str(number // 4), *(("a", "b") if number % 4 == 3 and number < 20 else ("", "")))
        for number, row in enumerate(rows_of(40))
    ]
    rows = [(row[0], "do" if row[4] else row[1], *row[2:]) for row in rows]
    path = write_table(tmp_path, rows, columns=columns)
    collect_own_pairs(own(path, held_out=0.5), str(tmp_path / "out"))
    pairs = read(tmp_path / "out", "pairs", PAIRS)
    by_number = {decoded_number(row): row for row in pairs}
    for number in range(40):
        assert by_number[number]["split"] == by_number[number // 4 * 4]["split"]
    same = [by_number[number] for number in (3, 7, 11, 15, 19)]
    assert {row["triplet_key"] for row in same} == {triplet_key("a", "do", "b")}
    assert len({row["split"] for row in same}) == 1
    assert len({row["split"] for row in pairs}) == 2


def decoded_number(row):
    """Which of `rows_of` it is."""
    digest = pixel_digest(decode_image(row["source_image"]["bytes"]))
    return next(n for n in range(40) if pixel_digest(pixels(2 * n)) == digest)


def test_too_many_unusable_rows_fail_with_their_reasons_and_more_may_be_allowed(tmp_path):
    rows = [*rows_of(6), (b"x", "a", b"y"), (b"x", "", b"y"), rows_of(1)[0], rows_of(2)[1]]
    path, out = write_table(tmp_path, rows), str(tmp_path / "out")
    with pytest.raises(StageError) as raised:
        collect_own_pairs(own(path, max_reject_share=0.19), out)
    told = str(raised.value)
    assert "2 of 10 rows are unusable, more than a share of 0.19" in told
    assert "empty_instruction 1, image_broken 1" in told
    assert "rejects/pairs" in told
    assert "--max-reject-share" in told
    assert len(read(out, "rejects/pairs", REJECTS)) == 4
    assert collect_own_pairs(own(path, max_reject_share=0.2), out).rows == 6


def test_what_was_mended_is_found_by_the_same_command(tmp_path):
    rows = [*rows_of(4), ("4-0.bin", "make it 4", encoded(9)), rows_of(6)[5]]
    path, out = write_table(tmp_path, rows), str(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(StageError, match="1 of 6 rows are unusable"):
            collect_own_pairs(own(path, max_reject_share=0.1), out)
        [reject] = read(out, "rejects/pairs", REJECTS)
        assert (reject["key"], reject["reason"]) == ("pairs.csv:6", "image_missing")
    (tmp_path / "4-0.bin").write_bytes(encoded(8))
    assert collect_own_pairs(own(path, max_reject_share=0.1), out).rows == 6
    assert len(read(out, "scores", SCORES)) == 6
    assert read(out, "rejects/pairs", REJECTS) == []


def test_a_share_that_a_finished_run_exceeds_costs_nothing_of_it(tmp_path):
    path, out = write_table(tmp_path, [*rows_of(2), (b"x", "a", b"y")]), str(tmp_path / "out")
    made = collect_own_pairs(own(path), out)
    with pytest.raises(StageError, match="unusable"):
        collect_own_pairs(own(path, max_reject_share=0.1), out)
    assert len(read(out, "checked", CHECKED)) == 3
    assert collect_own_pairs(own(path), out) == made


def test_datasets_that_were_not_read_off_checked_rows_stay(tmp_path):
    out = tmp_path / "out"
    origin = {"config": {}, "sources": {"candidates": "a"}}
    for name in ("scores", "rejects/pairs"):
        (out / name).mkdir(parents=True)
        (out / name / "_origin.json").write_text(json.dumps(origin))
    with pytest.raises(DatasetError, match="made differently"):
        collect_own_pairs(own(write_table(tmp_path, rows_of(1))), str(out))
    for name in ("scores", "rejects/pairs"):
        assert (out / name / "_origin.json").exists()


def test_no_usable_row_and_no_row_at_all_are_told(tmp_path):
    path = write_table(tmp_path / "a", [(b"x", "a", b"y")])
    with pytest.raises(StageError, match="none of 1 rows could be kept: image_broken 1"):
        collect_own_pairs(own(path), str(tmp_path / "out"))
    path = write_table(tmp_path / "b", [])
    with pytest.raises(StageError, match="there is no row in the input"):
        collect_own_pairs(own(path), str(tmp_path / "none"))


def test_pairs_of_a_resolution_can_be_encoded_and_trained_on(tmp_path):
    rows = rows_of(3, size=(48, 40)) + rows_of(3, start=3, kind="JPEG")
    path = write_table(tmp_path / "mine", rows)
    config = OwnPairsConfig(min_side=16, resolution=32)
    collect_own_pairs(own(path, config=config, held_out=0.0), str(tmp_path / "out"))
    model = tmp_path / "model"
    tiny_stable_diffusion().save(model)
    shard = pq.read_table(tmp_path / "out" / "pairs" / "train-00000.parquet")
    latents = EncodePairs(str(model))(shard)
    assert latents.schema.equals(LATENTS)
    storage.write_shard(tmp_path / "latents", "latents-00000", latents)
    dataset = LatentDataset(tmp_path / "latents")
    assert len(dataset) == dataset.pairs == 6
    assert dataset.shape == (4, 16, 16)
    found = {dataset.read(number).instruction for number in range(6)}
    assert found == {f"make it {number}" for number in range(6)}


def test_several_sizes_are_told_unless_they_are_brought_to_one(tmp_path, caplog):
    path = write_table(tmp_path, rows_of(3) + rows_of(1, start=3, size=(40, 32)))
    collect_own_pairs(own(path), str(tmp_path / "out"))
    [told] = [text for text in caplog.messages if "sizes" in text]
    assert "their pictures have 2 sizes (3 have 32 x 32)" in told
    assert "--resolution" in told
    caplog.clear()
    config = OwnPairsConfig(min_side=16, resolution=32)
    collect_own_pairs(own(path, config=config), str(tmp_path / "other"))
    assert "sizes" not in caplog.text


def test_all_pairs_held_out_is_told(tmp_path, caplog):
    path = write_table(tmp_path, rows_of(1))
    collect_own_pairs(own(path, held_out=0.999999), str(tmp_path / "out"))
    assert "all of them are held out" in caplog.text


JUDGE = WEIGHTS / "judge"


@pytest.fixture(scope="module")
def judge():
    return Clip.load(JUDGE)


def test_a_judge_scores_what_the_captions_allow(tmp_path, judge):
    columns = (*NAMES, "caption", "edited_caption")
    captions = [("a red ball", "a blue ball"), ("", ""), ("a red ball", ""), ("", "a blue ball")]
    rows = [(*row, *texts) for row, texts in zip(rows_of(4), captions, strict=True)]
    rules = Rules(thresholds=Thresholds(text=-1, image=-1, direction=-1), keep=None)
    path = write_table(tmp_path / "mine", rows, columns=columns)
    given = own(path, rules=rules)
    assert collect_own_pairs(given, str(tmp_path / "out"), judge).models == {
        "judge": judge.fingerprint()
    }
    pairs = read(tmp_path / "out", "pairs", PAIRS)
    found = {row["instruction"]: row for row in pairs}
    source, edited = (np.stack([np.asarray(pixels(n))] * 1) for n in (0, 1))
    [truth] = judge.similarities(source, edited, ["a red ball"], ["a blue ball"]).rows()
    for name, value in truth.items():
        assert found["make it 0"][name] == pytest.approx(value, abs=1e-5)
    known = {
        number: [name for name in SIMILARITIES if found[f"make it {number}"][name] is not None]
        for number in range(1, 4)
    }
    assert known == {
        1: ["image_similarity"],
        2: ["caption_similarity", "image_similarity"],
        3: ["edited_caption_similarity", "image_similarity"],
    }


def test_thresholds_apply_to_own_pairs_and_can_be_chosen_again(tmp_path, judge):
    path = write_table(tmp_path / "mine", rows_of(10))
    loose = Rules(thresholds=Thresholds(image=-1), keep=None)
    collect_own_pairs(own(path, rules=loose), str(tmp_path / "out"), judge)
    scores = {r["pair_key"]: r["image_similarity"] for r in read(tmp_path / "out", "pairs", PAIRS)}
    assert len(scores) == 10
    middle = sorted(scores.values())[5]
    strict = Rules(thresholds=Thresholds(image=middle), keep=None)
    expected = {key for key, value in scores.items() if value >= middle}
    rejudge_pairs(str(tmp_path / "out"), str(tmp_path / "again"), strict)
    assert {row["pair_key"] for row in read(tmp_path / "again", "pairs", PAIRS)} == expected
    made = collect_own_pairs(own(path, rules=strict), str(tmp_path / "once"), judge)
    assert {row["pair_key"] for row in read(tmp_path / "once", "pairs", PAIRS)} == expected
    assert made.reports[0]["rejected"] == {"image_similarity": 10 - len(expected)}
    impossible = Rules(thresholds=Thresholds(image=1.0), keep=None)
    with pytest.raises(StageError, match="10 by image_similarity below 1"):
        collect_own_pairs(own(path, rules=impossible), str(tmp_path / "none"), judge)
    assert len(read(tmp_path / "none", "scores", SCORES)) == 10  # the sentence names them
    assert collect_own_pairs(own(path, rules=loose), str(tmp_path / "none"), judge).rows == 10


def test_thresholds_without_similarities_ask_for_a_judge(tmp_path, judge):
    path = write_table(tmp_path, rows_of(2))
    rules = Rules(thresholds=Thresholds(image=-1))
    with pytest.raises(StageError, match="brought no similarities; name a CLIP model with --judge"):
        collect_own_pairs(own(path, rules=rules), str(tmp_path / "out"))
    assert collect_own_pairs(own(path, rules=rules), str(tmp_path / "out"), judge).rows == 2


def test_the_references_layout_brings_its_draws_and_scores(tmp_path):
    root = tmp_path / "root"
    for prompt in range(3):
        folder = root / f"{prompt:07d}"
        folder.mkdir(parents=True)
        texts = {"caption": f"cat {prompt}", "edit": "make it a dog", "output": f"dog {prompt}"}
        (folder / "prompt.json").write_text(json.dumps(texts))
        lines = []
        for seed in (10 * prompt, 10 * prompt + 1):
            (folder / f"{seed}_0.jpg").write_bytes(encoded(2 * seed, "JPEG"))
            (folder / f"{seed}_1.jpg").write_bytes(encoded(2 * seed + 1, "JPEG"))
            row = {"seed": seed, "p2p_threshold": 0.5, "cfg_scale": 9.0}
            row |= {"clip_sim_0": 0.3, "clip_sim_1": 0.3, "clip_sim_image": 0.8}
            lines.append(json.dumps(row | {"clip_sim_dir": 0.25 if seed % 2 else 0.1}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    (root / "0000002" / "21_1.jpg").unlink()
    collect_own_pairs(own(root), str(tmp_path / "all"))
    pairs = read(tmp_path / "all", "pairs", PAIRS)
    assert sorted(row["seed"] for row in pairs) == [0, 1, 10, 11, 20]
    assert {(row["self_replace"], row["guidance_scale"]) for row in pairs} == {(0.5, 9.0)}
    groups = {row["triplet_key"] for row in pairs}
    texts = [(f"cat {number}", "make it a dog", f"dog {number}") for number in range(3)]
    assert groups == {triplet_key(*each) for each in texts}
    [reject] = read(tmp_path / "all", "rejects/pairs", REJECTS)
    assert (reject["key"], reject["reason"]) == ("root/0000002/21", "image_missing")
    rules = Rules(thresholds=Thresholds())
    collect_own_pairs(own(root, rules=rules), str(tmp_path / "good"))
    good = read(tmp_path / "good", "pairs", PAIRS)
    assert sorted(row["seed"] for row in good) == [1, 11]


def test_what_was_exported_comes_back(tmp_path):
    columns = (*NAMES, "caption", "edited_caption")
    rows = [(*row, f"cat {n}", f"dog {n}") for n, row in enumerate(rows_of(6, kind="JPEG"))]
    collect_own_pairs(own(write_table(tmp_path, rows, columns=columns)), str(tmp_path / "out"))
    pairs = storage.read_dataset(tmp_path / "out" / "pairs", PAIRS)
    pq.write_table(published_table(pairs), tmp_path / "published.parquet")
    collect_own_pairs(own(tmp_path / "published.parquet"), str(tmp_path / "back"))
    back = storage.read_dataset(tmp_path / "back" / "pairs", PAIRS)
    assert back.sort_by("pair_key") == pairs.sort_by("pair_key")


def test_the_same_again_is_there_already_and_other_inputs_are_refused(tmp_path, caplog):
    caplog.set_level("INFO", logger="ip2p_ray")
    path, out = write_table(tmp_path, rows_of(3)), str(tmp_path / "out")
    first = collect_own_pairs(own(path), out)
    assert collect_own_pairs(own(path), out) == first
    assert "checked: there already, 3 rows" in caplog.text
    with pytest.raises(DatasetError, match="made differently"):
        collect_own_pairs(own(path, config=OwnPairsConfig(min_side=8)), out)
    write_table(tmp_path, rows_of(4))
    with pytest.raises(DatasetError, match="made differently"):
        collect_own_pairs(own(path), out)


def test_other_thresholds_need_a_folder_of_their_own(tmp_path):
    path, out = write_table(tmp_path, rows_of(3)), str(tmp_path / "out")
    collect_own_pairs(own(path), out)
    with pytest.raises(DatasetError, match=r"held_out 0\.3 there, 0\.1 now"):
        collect_own_pairs(own(path, held_out=0.1), out)


def test_foreign_files_stay(tmp_path):
    mine = tmp_path / "out" / "pairs" / "mine.parquet"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is not empty"):
        collect_own_pairs(own(write_table(tmp_path, rows_of(1))), str(tmp_path / "out"))
    assert mine.read_bytes() == b"mine"


class CutError(Exception):
    """The end of a run that is cut off."""


def test_a_killed_run_does_not_check_again_what_it_has_written(tmp_path):
    path = write_table(tmp_path, rows_of(50))
    files = PairFiles(paths=(path,))
    uri = str(tmp_path / "checked")

    def until(last):
        for number, given in enumerate(files):
            if number == last:
                raise CutError
            yield given

    size = checked.CHUNK
    with pytest.raises(CutError):
        check_rows(until(2 * size + 5), uri, CONFIG, None, shard_rows=size)
    assert len(storage.list_shards(uri)) == 2
    # Those that were written are not even opened again.
    for number in range(2 * size):
        (tmp_path / f"{number}-0.bin").unlink()
    check_rows(files, uri, CONFIG, None, shard_rows=size)
    storage.write_manifest(uri, storage.Manifest(dataset="checked"))
    rows = storage.read_dataset(uri, CHECKED).to_pylist()
    assert [row["place"] for row in rows] == [f"pairs.csv:{line}" for line in range(2, 52)]
    assert {row["reason"] for row in rows} == {None}


@pytest.mark.slow
def test_a_kill_anywhere_loses_nothing_and_leaves_nothing_twice(tmp_path):
    rows = [*rows_of(5), (b"x", "a", b"y"), rows_of(1)[0]]
    path, truth = write_table(tmp_path, rows), str(tmp_path / "truth")
    collect_own_pairs(own(path), truth)
    for event in itertools.count(0, 7):
        out = str(tmp_path / f"killed-{event}")
        killed = killed_at(event, lambda out=out: collect_own_pairs(own(path), out))
        collect_own_pairs(own(path), out)
        for name, schema in (
            *(("checked", CHECKED), ("scores", SCORES)),
            *(("pairs", PAIRS), ("rejects/pairs", REJECTS)),
        ):
            assert read(out, name, schema) == read(truth, name, schema)
        if not killed:
            break
    assert event > 20


@pytest.mark.slow
def test_a_kill_of_a_run_that_fails_leaves_nothing_of_what_was_mended_since(tmp_path):
    rows = [*rows_of(4), ("4-0.bin", "make it 4", encoded(9))]
    path, truth = write_table(tmp_path, rows), str(tmp_path / "truth")
    given, picture = own(path, max_reject_share=0.1), tmp_path / "4-0.bin"

    def fail(out):
        with suppress(StageError):
            collect_own_pairs(given, out)

    picture.write_bytes(encoded(8))
    collect_own_pairs(given, truth)
    for event in itertools.count(0, 7):
        out = str(tmp_path / f"killed-{event}")
        picture.unlink()
        fail(out)
        killed = killed_at(event, lambda out=out: fail(out))
        picture.write_bytes(encoded(8))
        with suppress(StageError):  # once more, where the kill fell before the end that it had
            collect_own_pairs(given, out)
        collect_own_pairs(given, out)
        for name, schema in (
            *(("checked", CHECKED), ("scores", SCORES)),
            *(("pairs", PAIRS), ("rejects/pairs", REJECTS)),
        ):
            assert read(out, name, schema) == read(truth, name, schema)
        if not killed:
            break
    assert event > 20


def test_an_input_that_changed_after_it_was_checked_is_told(tmp_path):
    path, out = write_table(tmp_path, rows_of(3)), tmp_path / "out"
    collect_own_pairs(own(path), str(out))
    (out / "pairs" / storage.MANIFEST).unlink()
    (tmp_path / "1-0.bin").unlink()
    told = r"changed since it was checked, first at pairs\.csv:3; delete .*checked and run"
    with pytest.raises(DatasetError, match=told):
        collect_own_pairs(own(path), str(out))
    (tmp_path / "1-0.bin").write_bytes(encoded(99))
    with pytest.raises(DatasetError, match=told):
        collect_own_pairs(own(path), str(out))
    # What it advises is all that is needed.
    storage.remove_all(out / "checked")
    collect_own_pairs(own(path), str(out))
    changed = next(r for r in read(out, "pairs", PAIRS) if r["instruction"] == "make it 1")
    assert changed["source_image"]["bytes"] == encoded(99)
    keys = {row["pair_key"] for row in read(out, "pairs", PAIRS)}
    assert {row["pair_key"] for row in read(out, "scores", SCORES)} == keys


def test_many_threads_keep_the_order(tmp_path):
    path = write_table(tmp_path, rows_of(40))
    collect_own_pairs(own(path, held_out=0.0), str(tmp_path / "out"))
    pairs = read(tmp_path / "out", "pairs", PAIRS)
    assert [row["instruction"] for row in pairs] == [f"make it {number}" for number in range(40)]


def test_pictures_in_a_parquet_file(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("input_image", image), ("edit_prompt", pa.string()), ("edited_image", image)]
    )
    content = [
        {
            "input_image": {"bytes": source, "path": None},
            "edit_prompt": instruction,
            "edited_image": {"bytes": edited, "path": None},
        }
        for source, instruction, edited in rows_of(40)
    ]
    pq.write_table(pa.Table.from_pylist(content, schema=schema), tmp_path / "a.parquet")
    assert collect_own_pairs(own(tmp_path / "a.parquet"), str(tmp_path / "out")).rows == 40


def test_lines_that_cannot_be_read_are_rejects_with_their_why(tmp_path):
    write_table(tmp_path, rows_of(4))
    names = [(f"{number}-0.bin", f"make it {number}", f"{number}-2.bin") for number in range(4)]
    lines = [json.dumps(dict(zip(NAMES, row, strict=True))) for row in names]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], '{"source_image": bro', *lines[1:]]))
    huge = "x" * (csv.field_size_limit() + 1)
    rows = [",".join(NAMES), *map(",".join, names), f'0-0.bin,"{huge}",1-2.bin']
    (tmp_path / "b.csv").write_text("\n".join(rows))
    for name, line, why in (("a.jsonl", 2, "not a line of JSON"), ("b.csv", 6, "larger than")):
        out = tmp_path / f"out-{name}"
        assert collect_own_pairs(own(tmp_path / name), str(out)).rows == 4
        [reject] = read(out, "rejects/pairs", REJECTS)
        assert (reject["key"], reject["reason"]) == (f"{name}:{line}", "unreadable_row")
        assert why in reject["detail"]


def write_prompt(root, **told):
    """The reference's layout with four pairs, of which the last has other metadata."""
    folder = root / "0"
    folder.mkdir(parents=True)
    texts = {"caption": "a cat", "edit": "make it a dog", "output": "a dog"}
    (folder / "prompt.json").write_text(json.dumps(texts))
    lines = []
    for seed in range(4):
        for place in (0, 1):
            (folder / f"{seed}_{place}.png").write_bytes(encoded(2 * seed + place))
        row = {"seed": seed, "p2p_threshold": 0.5, "cfg_scale": 9.0, "clip_sim_image": 0.8}
        row |= dict.fromkeys(("clip_sim_0", "clip_sim_1", "clip_sim_dir"), 0.3)
        lines.append(json.dumps({**row, **(told if seed == 3 else {})}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"clip_sim_dir": math.nan}, "direction_similarity"),
        ({"clip_sim_dir": math.inf}, "direction_similarity"),
        ({"clip_sim_0": 10**400}, "caption_similarity"),
        ({"clip_sim_image": "0.8"}, "image_similarity"),
        ({"seed": 3.5}, "bad_seed"),
        ({"cfg_scale": 16777217, "clip_sim_0": 10**18}, None),
        ({"clip_sim_dir": None, "cfg_scale": math.nan}, None),
    ],
)
def test_numbers_of_the_metadata_that_are_none_or_too_large(tmp_path, told, reason):
    root, out = write_prompt(tmp_path / "root", **told), tmp_path / "out"
    collect_own_pairs(own(root, rules=Rules(thresholds=Thresholds(), keep=None)), str(out))
    rejects = read(out, "rejects/pairs", REJECTS)
    assert [row["reason"] for row in rejects] == ([] if reason is None else [reason])
    again = Rules(thresholds=Thresholds(), keep=2)
    rejudge_pairs(str(out), str(tmp_path / "again"), again)
    assert len(read(tmp_path / "again", "pairs", PAIRS)) == 2
