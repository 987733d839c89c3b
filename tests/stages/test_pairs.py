import json
import logging
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError, ModelError, StageError
from ip2p_ray.filtering import Thresholds
from ip2p_ray.generator import GeneratorWeights, Holding
from ip2p_ray.images import decode_image
from ip2p_ray.pairs import PairConfig
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
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.stages import pair_actors, pairs
from ip2p_ray.testing.pairs import (
    DrawingJudge,
    Sleep,
    SleepingGenerator,
    models,
    write_triplets,
)

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
        table = pq.read_table(f"{made.uri('pairs')}/{split}-00000-00000.parquet")
        assert set(table["split"].to_pylist()) <= {split}


def test_every_candidate_has_its_scores(made, name):
    rows = storage.read_dataset(made.uri("scores"), SCORES).to_pylist()
    assert sorted(row["pair_key"] for row in rows) == expected_keys(made, name)


def test_candidates_do_not_depend_on_their_batch(made, name):
    config = made.preset.pairs
    triplets = storage.read_dataset(made.uri("triplets"), TRIPLETS)
    weights = GeneratorWeights(source=made.preset.generator)
    actor = pair_actors.GenerateCandidates(weights, Holding(batch_size=1), config, name)
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
    (table,) = pair_actors.JudgeCandidates(made.preset.judge, strict)(rows)
    first, second = table.to_pylist()[0]["candidates"]
    kept, dropped = (first, second) if first["reason"] is None else (second, first)
    assert kept["source_image"]["bytes"]
    assert dropped["reason"] == "not_best"
    assert dropped["source_image"] is None
    assert dropped["edited_image"] is None
    assert kept["direction_similarity"] >= dropped["direction_similarity"]


class CrampedJudge(pair_actors.JudgeCandidates):
    """A judge on whose device only so many candidates fit."""

    most = 1

    def _score(self, row, candidates):
        if len(candidates) > self.most:
            raise torch.OutOfMemoryError(f"tried to judge {len(candidates)}")
        super()._score(row, candidates)


def test_a_judge_whose_batch_does_not_fit_takes_fewer(made, name, caplog):
    rows = storage.read_dataset(made.uri("candidates"), CANDIDATES).slice(0, 3)
    judge = CrampedJudge(made.preset.judge, made.preset.pairs, batch_size=2)
    with caplog.at_level(logging.WARNING, logger="ip2p_ray.memory"):
        (judged,) = judge(rows.slice(0, 1))
        list(judge(rows.slice(1, 2)))
    assert caplog.messages == ["judge: 2 candidates at a time do not fit on cpu, goes on with 1"]
    before = rows.slice(0, 1).to_pylist()[0]["candidates"]
    for old, new in zip(before, judged.to_pylist()[0]["candidates"], strict=True):
        assert new["image_similarity"] == pytest.approx(old["image_similarity"], abs=1e-4)
        # of small differences of pictures: rounding, which is the processor's, shows more
        assert new["direction_similarity"] == pytest.approx(old["direction_similarity"], abs=1e-3)
    judge.most = 0
    with pytest.raises(ModelError, match="judge: not even 1 at a time fit"):
        list(judge(rows.slice(0, 1)))


def test_rejects_say_why_and_no_pair_at_all_fails_the_stage(made, tmp_path):
    config = replace(made.preset.pairs, thresholds=Thresholds(text=1, image=-1, direction=-1))
    making = pairs.Making(
        generator=GeneratorWeights(source=made.preset.generator),
        judge=made.preset.judge,
        holding=Holding(batch_size=4),
    )
    models = storage.read_manifest(made.uri("candidates")).models
    with pytest.raises(StageError) as caught:
        pairs.generate_pairs(made.uri("triplets"), str(tmp_path), config, making, models=models)
    count = 2 * storage.read_manifest(made.uri("triplets")).rows
    assert f"none of {count} candidates" in str(caught.value)
    assert f"{count} by caption_similarity below 1" in str(caught.value)
    rejects = storage.read_dataset(str(tmp_path / "rejects" / "pairs"), REJECTS).to_pylist()
    assert {row["reason"] for row in rejects} == {"caption_similarity"}
    assert all(-1 <= float(row["detail"]) < 1 for row in rejects)
    assert len(rejects) == count
    rows = storage.read_dataset(str(tmp_path / "candidates"), CANDIDATES).to_pylist()
    shown = [candidate for row in rows for candidate in row["candidates"]]
    assert all(decode_image(candidate["edited_image"]["bytes"]) for candidate in shown)


def test_rows_lie_in_the_order_of_their_triplets_in_few_shards(made):
    rows = storage.read_dataset(made.uri("candidates"), CANDIDATES).to_pylist()
    keys = [row["triplet_key"] for row in rows]
    assert keys == sorted(keys)
    assert [shard.name for shard in storage.read_manifest(made.uri("candidates")).shards] == [
        "part-00000/candidates-00000.parquet"
    ]
    assert not (made.folder / "candidates" / "part-00000" / pairs.WORK).exists()
    assert all(row["seconds"] > 0 for row in rows)


def test_a_run_that_ended_between_parts_goes_on(local_ray, tmp_path):
    triplets, folder = str(tmp_path / "triplets"), str(tmp_path / "out")
    write_triplets(triplets, 10)
    config = PairConfig(candidates=4, keep=2, thresholds=Thresholds(text=0, image=0, direction=0))
    log = tmp_path / "log"
    making = pairs.Making(
        generator=Sleep(log=str(log)),
        judge="drawing",
        holding=Holding(batch_size=4),
        part_triplets=4,
    )
    fakes = (SleepingGenerator, DrawingJudge)

    def make():
        pairs.generate_pairs(triplets, folder, config, making, models=models(), actors=fakes)
        return storage.read_dataset(f"{folder}/pairs", PAIRS).sort_by("pair_key")

    first = make()
    assert first.num_rows == 20
    assert not list((tmp_path / "out" / "candidates").rglob(".*"))  # blocks and notes are gone
    for name in ("candidates/_manifest.json", "candidates/part-00002/_manifest.json"):
        (tmp_path / "out" / name).unlink()
    for name in ("pairs", "scores", "rejects/pairs"):
        storage.remove_all(f"{folder}/{name}")
    again = make()
    assert again.equals(first)
    made = [json.loads(line)["key"] for line in log.read_text().splitlines()]
    assert len(made) == 12  # ten, and the two of the part that was not whole


@pytest.mark.parametrize(
    ("batch_size", "candidates", "rows"),
    [(8, 1, 8), (8, 2, 4), (8, 3, 5), (16, 100, 1), (64, 100, 3), (32, 32, 1), (1, 100, 1)],
)
def test_an_actor_takes_the_fewest_triplets_that_fill_its_batches(batch_size, candidates, rows):
    assert pairs.triplets_at_a_time(batch_size, candidates) == rows


def test_what_cannot_go_together_is_refused():
    weights, search = GeneratorWeights(source="g"), SearchConfig(share_source=4)
    with pytest.raises(ConfigError, match="judges must be None"):
        pairs.Making(generator=weights, judge="j", options=search)
    with pytest.raises(ConfigError, match="share_source 4 wants a batch_size of at least 3, got 2"):
        pairs.Making(
            generator=weights,
            judge="j",
            judges=None,
            options=search,
            holding=Holding(batch_size=2),
        )
