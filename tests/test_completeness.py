import json
import re

import pyarrow as pa
import pytest

from ip2p_ray import completeness, storage
from ip2p_ray.completeness import Completeness, compare
from ip2p_ray.errors import ConfigError, DatasetError
from ip2p_ray.schema import (
    CANDIDATES,
    CAPTIONS,
    LATENTS,
    PAIRS,
    REJECTS,
    SCORES,
    TRIPLETS,
    pair_key,
)


def test_the_counts_of_a_case_worked_by_hand():
    found = compare(lambda: ["a", "b", "c", "d"], ["b", "x", "a", "b", "x", "b"])
    assert found == Completeness(wanted=4, lost=2, duplicate=3, unexpected=1, missing=("c", "d"))


def test_a_key_that_is_wanted_twice_is_wanted_once():
    assert compare(lambda: ["a", "a"], ["a"]) == Completeness(
        wanted=1, lost=0, duplicate=0, unexpected=0
    )


def test_few_of_many_lost_keys_are_named():
    found = compare(lambda: (str(number) for number in range(5000)), map(str, range(10, 4000)))
    assert found.lost == 1010
    assert found.missing == ("0", "1", "2", "3", "4")


def dataset(uri, name, schema, rows, config=None):
    """A whole dataset of rows that have only the columns given."""
    rows = [{**dict.fromkeys(schema.names), **row} for row in rows]
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        table = pa.Table.from_pylist(part, schema=schema)
        storage.write_shard(str(uri), f"train-{number:05d}", table)
    manifest = storage.Manifest(dataset=name, recipe="r", config=config or {})
    storage.write_manifest(str(uri), manifest)
    return str(uri)


def counts(found):
    return found.lost, found.duplicate, found.unexpected


@pytest.fixture
def made(tmp_path):
    """Three triplets with two candidates each, of which three are kept, and all that follows."""
    keys = ["k0", "k1", "k2"]
    reasons = {("k0", 0): "text", ("k1", 1): "rank", ("k2", 0): "text"}
    draws = {"seed": 1, "self_replace": 0.5, "guidance_scale": 2.0}
    dataset(tmp_path / "queue", "queue", TRIPLETS, [{"triplet_key": key} for key in keys])
    rows = [
        {
            "triplet_key": key,
            "recipe": "r",
            "candidates": [
                {
                    **dict.fromkeys(field.name for field in CANDIDATE),
                    **draws,
                    "index": index,
                    "reason": reasons.get((key, index)),
                }
                for index in range(2)
            ],
        }
        for key in keys
    ]
    dataset(tmp_path / "candidates", "candidates", CANDIDATES, rows)
    scores = [
        {"pair_key": pair_key(key, index, "r"), "reason": reasons.get((key, index))}
        for key in keys
        for index in range(2)
    ]
    dataset(tmp_path / "scores", "scores", SCORES, scores)
    kept = [row["pair_key"] for row in scores if row["reason"] is None]
    splits = ["train", "held_out", "train"]
    pairs = [{"pair_key": key, "split": split} for key, split in zip(kept, splits, strict=True)]
    dataset(tmp_path / "pairs", "pairs", PAIRS, pairs)
    return tmp_path, kept


CANDIDATE = CANDIDATES.field("candidates").type.value_type


def test_a_whole_run_has_all_its_keys_once(made):
    folder, kept = made
    for name, source, wanted in (
        ("candidates", "queue", 3),
        ("scores", "candidates", 6),
        ("pairs", "candidates", 3),
    ):
        found = completeness.check(str(folder / name))
        assert found == (
            str(folder / source),
            Completeness(wanted=wanted, lost=0, duplicate=0, unexpected=0),
        )
    source, found = completeness.check(str(folder / "pairs"), str(folder / "scores"))
    assert (found.wanted, *counts(found)) == (len(kept), 0, 0, 0)


@pytest.mark.parametrize(("split", "wanted"), [("train", 2), ("all", 3)])
def test_latents_are_wanted_of_the_splits_that_were_encoded(made, split, wanted):
    folder, kept = made
    here = [kept[0], kept[2]] if split == "train" else kept
    uri = dataset(
        folder / "latents",
        "latents",
        LATENTS,
        [{"pair_key": key} for key in here],
        {"split": split},
    )
    found = completeness.check(uri)[1]
    assert (found.wanted, *counts(found)) == (wanted, 0, 0, 0)


def test_what_is_lost_or_twice_or_of_another_run_is_counted(made):
    folder, kept = made
    rows = [{"pair_key": key} for key in (kept[0], kept[0], "other")]
    uri = dataset(folder / "elsewhere" / "pairs", "pairs", PAIRS, rows)
    found = completeness.check(uri, str(folder / "candidates"))[1]
    assert counts(found) == (2, 1, 1)
    assert found.missing == (kept[1], kept[2])
    rows = [{"triplet_key": "k0"}, {"triplet_key": "k0"}, {"triplet_key": "k1"}]
    uri = dataset(folder / "candidates", "candidates", CANDIDATES, rows)
    assert counts(completeness.check(uri)[1]) == (1, 1, 0)


def test_each_caption_gives_a_triplet_or_a_reject(tmp_path):
    dataset(tmp_path / "replies", "replies", CAPTIONS, [{"caption_key": key} for key in "abc"])
    dataset(tmp_path / "rejects" / "triplets", "triplets", REJECTS, [{"key": "b"}])
    uri = dataset(
        tmp_path / "triplets", "triplets", TRIPLETS, [{"caption_key": key} for key in "ac"]
    )
    assert counts(completeness.check(uri)[1]) == (0, 0, 0)
    dataset(tmp_path / "triplets", "triplets", TRIPLETS, [{"caption_key": key} for key in "bb"])
    assert counts(completeness.check(uri)[1]) == (2, 2, 0)


def test_what_cannot_be_compared_is_told(made):
    folder, _ = made
    for uri, source, error, told in (
        (folder / "queue", None, ConfigError, "is a dataset of queue; those that can be checked"),
        (
            folder / "pairs",
            folder / "queue",
            ConfigError,
            "pairs are made from candidates or scores",
        ),
        (folder / "nothing", None, DatasetError, "nothing"),
    ):
        with pytest.raises(error, match=re.escape(told)):
            completeness.check(str(uri), None if source is None else str(source))
    storage.remove_all(str(folder / "queue"))
    with pytest.raises(DatasetError, match="say what it was made from"):
        completeness.check(str(folder / "candidates"))


def test_a_ledger_tells_what_was_made_again(tmp_path):
    ledger = tmp_path / "ledger"
    ledger.write_text("".join(json.dumps({"key": key}) + "\n" for key in "abacaa"))
    assert completeness.recomputed(ledger) == 3
    with ledger.open("a") as file:
        file.write('{"key": "a')  # cut by a kill
    assert completeness.recomputed(ledger) == 3
    ledger.write_text('{"pid": 3}\n')
    with pytest.raises(DatasetError, match="lines of JSON with a key"):
        completeness.recomputed(ledger)
    with pytest.raises(DatasetError, match="cannot be read"):
        completeness.recomputed(tmp_path / "no")
