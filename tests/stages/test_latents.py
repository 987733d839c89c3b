import numpy as np
import pyarrow.parquet as pq
import pytest

from ip2p_ray import storage
from ip2p_ray.errors import StageError
from ip2p_ray.latents import LatentDataset
from ip2p_ray.schema import LATENTS, PAIRS
from ip2p_ray.stages import run
from ip2p_ray.stages.latents import EncodePairs, encode_latents

pytestmark = pytest.mark.ray


def test_the_pairs_of_the_train_split_are_encoded(made):
    rows = storage.read_dataset(made.uri("latents"), LATENTS).to_pylist()
    pairs = storage.read_dataset(made.uri("pairs"), PAIRS).to_pylist()
    train = sorted(row["pair_key"] for row in pairs if row["split"] == "train")
    assert sorted(row["pair_key"] for row in rows) == train
    assert LatentDataset(made.uri("latents")).shape[1:] == (8, 8)


def test_a_latent_does_not_depend_on_its_batch(made):
    shard = pq.read_table(f"{made.uri('pairs')}/train-00000-00000.parquet")
    (alone,) = EncodePairs(made.preset.generator)(shard.slice(1, 1)).to_pylist()
    stored = storage.read_dataset(made.uri("latents"), LATENTS).to_pylist()
    (kept,) = (row for row in stored if row["pair_key"] == alone["pair_key"])
    assert kept["instruction"] == alone["instruction"]
    near, there = (np.frombuffer(row["edited_mean"], np.float16) for row in (alone, kept))
    np.testing.assert_allclose(near, there, atol=1e-2)


def test_an_empty_train_split_fails_the_stage(tmp_path):
    uri = str(tmp_path / "pairs")
    origin = run.Origin(dataset="pairs", config={})
    empty = PAIRS.empty_table()
    run.make(uri, origin, lambda: storage.write_shard(uri, "train-00000", empty) or [])
    with pytest.raises(StageError, match="train split"):
        encode_latents(
            uri,
            str(tmp_path / "latents"),
            generator="g",
            models={"generator": "g"},
            resources=run.Resources(),
        )
