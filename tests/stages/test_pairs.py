from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray import storage
from ip2p_ray.errors import StageError
from ip2p_ray.filtering import Thresholds
from ip2p_ray.images import decode_image
from ip2p_ray.schema import (
    CANDIDATES,
    PAIRS,
    REJECTS,
    SCORES,
    SIMILARITIES,
    TRIPLETS,
    pair_key,
    recipe,
)
from ip2p_ray.stages import pairs, run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def name(made):
    models = storage.read_manifest(made.uri("candidates")).models
    return recipe(made.preset.pairs, models["generator"], models["judge"])


def expected_keys(made, name):
    triplets = storage.read_dataset(made.uri("triplets"), TRIPLETS).to_pylist()
    return sorted(
        pair_key(row["triplet_key"], index, name)
        for row in triplets
        for index in range(made.preset.pairs.candidates)
    )


def test_there_is_one_row_for_each_triplet_with_its_candidates_nested(made):
    rows = storage.read_dataset(made.uri("candidates"), CANDIDATES).to_pylist()
    triplets = storage.read_dataset(made.uri("triplets"), TRIPLETS).to_pylist()
    assert sorted(row["triplet_key"] for row in rows) == sorted(
        row["triplet_key"] for row in triplets
    )
    for row in rows:
        assert row["status"] == "ok"
        assert [candidate["index"] for candidate in row["candidates"]] == [0, 1]


def test_pairs_have_the_keys_of_their_content(made, name):
    rows = storage.read_dataset(made.uri("pairs"), PAIRS).to_pylist()
    assert sorted(row["pair_key"] for row in rows) == expected_keys(made, name)
    for row in rows:
        for column in ("source_image", "edited_image"):
            assert decode_image(row[column]["bytes"]).size == (64, 64)
        assert all(-1.001 <= row[name] <= 1.001 for name in SIMILARITIES)
        assert row["recipe"] == name


def test_shards_are_named_by_split(made):
    for split in ("train", "held_out"):
        table = pq.read_table(f"{made.uri('pairs')}/{split}-00000.parquet")
        assert set(table["split"].to_pylist()) <= {split}


def test_every_candidate_has_its_scores(made, name):
    rows = storage.read_dataset(made.uri("scores"), SCORES).to_pylist()
    assert sorted(row["pair_key"] for row in rows) == expected_keys(made, name)


def test_candidates_do_not_depend_on_their_batch(made, name):
    config = made.preset.pairs
    triplets = storage.read_dataset(made.uri("triplets"), TRIPLETS)
    actor = pairs.GenerateCandidates(made.preset.generator, config, name, batch_size=1)
    stored = {
        row["triplet_key"]: row["candidates"]
        for row in storage.read_dataset(made.uri("candidates"), CANDIDATES).to_pylist()
    }
    (table,) = actor(triplets.slice(2, 1))
    (row,) = table.to_pylist()
    for alone, kept in zip(row["candidates"], stored[row["triplet_key"]], strict=True):
        assert alone["seed"] == kept["seed"]
        pictures = (
            np.asarray(decode_image(candidate["edited_image"]["bytes"])).astype(int)
            for candidate in (alone, kept)
        )
        assert np.abs(next(pictures) - next(pictures)).max() <= 1


def test_the_judge_keeps_the_images_of_kept_candidates_only(made, name):
    rows = storage.read_dataset(made.uri("candidates"), CANDIDATES).slice(0, 1)
    strict = replace(made.preset.pairs, keep=1)
    (table,) = pairs.JudgeCandidates(made.preset.judge, strict)(rows)
    first, second = table.to_pylist()[0]["candidates"]
    kept, dropped = (first, second) if first["reason"] is None else (second, first)
    assert kept["source_image"]["bytes"]
    assert dropped["reason"] == "not_best"
    assert dropped["source_image"] is None
    assert dropped["edited_image"] is None
    assert kept["direction_similarity"] >= dropped["direction_similarity"]


def test_rejects_say_why_and_no_pair_at_all_fails_the_stage(made, tmp_path):
    """The candidates stand already in the folder, all of them too low in image_similarity."""
    config = replace(made.preset.pairs, thresholds=Thresholds(text=-1, image=0.99, direction=-1))
    rows = storage.read_dataset(made.uri("candidates"), CANDIDATES).to_pylist()
    for row in rows:
        for candidate in row["candidates"]:
            candidate.update(
                image_similarity=0.5,
                reason="image_similarity",
                source_image=None,
                edited_image=None,
            )
    uri = str(tmp_path / "candidates")
    table = pa.Table.from_pylist(rows, schema=CANDIDATES)
    origin = run.Origin(
        dataset="candidates",
        config=pairs.asdict(config),
        models={"generator": "g", "judge": "j"},
        sources={"triplets": storage.read_manifest(made.uri("triplets")).recipe},
    )
    run.make(uri, origin, lambda: storage.write_shard(uri, "c-0", table) or [])
    with pytest.raises(StageError) as caught:
        pairs.generate_pairs(
            made.uri("triplets"),
            str(tmp_path),
            config,
            generator="g",
            judge="j",
            models=origin.models,
            resources=run.Resources(),
        )
    count = 2 * len(rows)
    assert f"none of {count} candidates" in str(caught.value)
    assert f"{count} by image_similarity below 0.99" in str(caught.value)
    rejects = storage.read_dataset(str(tmp_path / "rejects" / "pairs"), REJECTS).to_pylist()
    assert {(row["reason"], row["detail"]) for row in rejects} == {("image_similarity", "0.500")}
    assert len(rejects) == count
