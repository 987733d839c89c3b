"""Pools of nodes for each kind of work; nodes die in the middle, and the outcome is the same."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load

from ip2p_ray import storage
from ip2p_ray.completeness import recomputed
from ip2p_ray.schema import LATENTS, PAIRS, SCORES, SIMILARITIES
from ip2p_ray.stages.latents import EncodePairs, Encoding
from ip2p_ray.stages.training import read_metrics
from ip2p_ray.testing.pairs import write_triplets
from tests.jobs.test_encode_latents import write_pairs
from tests.nodes import pools

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

DRIVER = Path(__file__).parent / "nodes_driver.py"
TRIPLETS, MADE, SECONDS = 32, 8, 0.3
COUNT, WRITTEN = 240, 6
STEPS, NOTED = 200, 40


@pytest.fixture(scope="module")
def cluster():
    """A head without a CPU, and nodes for generators, CLIP judges and whatever is small."""
    with pools() as found:
        found.add("generator", amount=2)
        found.add("clip")
        found.add("cpu", cpus=2)
        found.cluster.wait_for_nodes()
        yield found


@pytest.fixture(autouse=True)
def _nothing_seen_yet(cluster):
    cluster.seen.clear()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("pairs") / "pairs")
    write_pairs(uri, COUNT)
    return uri


@pytest.fixture(scope="module")
def encoded(pairs, tiny_weights):
    """Rows of LATENTS of the train split, made in this process and in order."""
    table = pq.read_table(f"{pairs}/train-00000.parquet")
    encode = EncodePairs(str(tiny_weights / "generator"), Encoding())
    parts = [encode(table.slice(start, 4)) for start in range(0, len(table), 4)]
    return pa.concat_tables(parts).sort_by("pair_key")


def outcome(folder):
    """Pairs and scores, by key."""
    found = {}
    for name, schema, columns in (
        ("scores", SCORES, ("pair_key", "seed", *SIMILARITIES, "reason")),
        ("pairs", PAIRS, ("pair_key", "triplet_key", "seed", *SIMILARITIES, "source_image")),
    ):
        rows = storage.read_dataset(str(folder / name), schema, columns=list(columns)).to_pylist()
        found[name] = sorted(rows, key=lambda row: row["pair_key"])
    return found


def test_a_generator_node_and_then_the_driver_killed_in_the_middle_change_nothing(
    cluster, tmp_path
):
    write_triplets(str(tmp_path / "triplets"), TRIPLETS)
    ledger, log = tmp_path / "ledger", tmp_path / "log"

    def start(name, seconds, notes):
        return cluster.start(
            DRIVER, "generate", tmp_path / "triplets", tmp_path / name, seconds, notes, log=log
        )

    def lines():
        return ledger.read_text().splitlines() if ledger.exists() else []

    def pids():
        return {json.loads(line)["pid"] for line in lines()}

    cluster.finish(start("undisturbed", 0.0, tmp_path / "first"), log)
    expected = outcome(tmp_path / "undisturbed")
    assert len(expected["scores"]) == 4 * TRIPLETS

    driver = start("killed", SECONDS, ledger)
    cluster.wait(driver, log, lambda: len(lines()) >= MADE)
    cluster.kill("generator")
    before = pids()
    cluster.add("generator", amount=2)
    cluster.wait(driver, log, lambda: len(lines()) >= 2 * MADE)
    assert pids() - before, "nothing was made on the new node"
    driver.kill()
    driver.wait()
    assert len(lines()) < TRIPLETS
    cluster.finish(start("killed", SECONDS, ledger), log)

    assert outcome(tmp_path / "killed") == expected
    assert cluster.where("SleepingGenerator") == {"generator"}
    assert cluster.where("DrawingJudge") == {"clip"}
    assert cluster.seen["cpu"], "nothing ran on the node for small work"
    assert not cluster.head_work
    logger.info("recomputed = %d of %d triplets", recomputed(ledger), TRIPLETS)


def test_a_node_killed_in_the_middle_of_encoding_changes_nothing(
    cluster, pairs, encoded, tiny_weights, tmp_path
):
    log, uri = tmp_path / "log", tmp_path / "latents"
    driver = cluster.start(DRIVER, "encode", pairs, uri, tiny_weights / "generator", log=log)
    cluster.wait(driver, log, lambda: len(storage.list_shards(str(uri))) >= WRITTEN)
    cluster.kill("generator")
    assert len(storage.list_shards(str(uri))) < len(encoded) / 4
    cluster.add("generator", amount=2)
    cluster.finish(driver, log)

    rows = storage.read_dataset(str(uri), LATENTS).sort_by("pair_key")
    assert rows["pair_key"].to_pylist() == encoded["pair_key"].to_pylist()
    for name in ("pair_key", "triplet_key", "instruction", "split", "shape"):
        assert rows[name].to_pylist() == encoded[name].to_pylist()
    for name in ("source_mode", "edited_mean", "edited_std"):
        ours, theirs = (numbers(table, name) for table in (rows, encoded))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)
    assert cluster.where("EncodePairs") == {"generator"}
    assert cluster.where("_measure") <= {"generator"}
    assert not cluster.head_work


def numbers(table, name):
    return np.frombuffer(b"".join(table[name].to_pylist()), np.float16).astype(np.float32)


def test_a_node_of_one_of_two_workers_killed_in_training_changes_nothing(
    cluster, encoded, tiny_weights, tmp_path
):
    uri, log = str(tmp_path / "latents"), tmp_path / "log"
    storage.write_shard(uri, "part-00000", encoded)
    storage.write_manifest(uri, storage.Manifest(dataset="latents", recipe="noise"))
    cluster.add("trainer")
    cluster.add("trainer")
    cluster.cluster.wait_for_nodes()

    def start(name):
        return cluster.start(
            DRIVER, "train", uri, tmp_path / name, tiny_weights, str(STEPS), log=log
        )

    def noted(name):
        place = tmp_path / name / "checkpoints"
        return read_metrics(place) if place.is_dir() else []

    cluster.finish(start("undisturbed"), log)
    driver = start("killed")
    cluster.wait(driver, log, lambda: len(noted("killed")) >= NOTED)
    cluster.kill("trainer")
    assert len(noted("killed")) < STEPS
    cluster.add("trainer")
    cluster.finish(driver, log)
    assert "goes on at the newest checkpoint after a failure" in log.read_text()

    difference = compared(tmp_path / "killed", tmp_path / "undisturbed")
    assert cluster.where("RayTrainWorker") == {"trainer"}
    assert cluster.where("_survey") <= {"trainer"}
    assert not cluster.head_work
    logger.info("largest difference of a loss: %g", difference)


def compared(killed, undisturbed):
    """The largest difference of a loss between two runs, once they are found to be the same."""
    rows, expected = (
        read_metrics(storage.join(run, "checkpoints")) for run in (killed, undisturbed)
    )
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    losses = [[row["loss"] for row in each] for each in (rows, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    name = "editor/unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (load(storage.read_bytes(storage.join(r, name))) for r in (killed, undisturbed))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-3)
    return np.abs(np.subtract(*losses)).max()


def test_nodes_that_share_only_a_bucket_and_lose_one_of_them_train_the_same(
    cluster, encoded, tiny_weights, bucket, tmp_path, monkeypatch
):
    """Each node has a disk of its own for copies and for checkpoints on their way."""
    uri, log = f"{bucket}/latents", tmp_path / "log"
    storage.write_shard(uri, "part-00000", encoded)
    storage.write_manifest(uri, storage.Manifest(dataset="latents", recipe="noise"))

    def add(number):
        monkeypatch.setenv("IP2P_CACHE", str(tmp_path / f"disk-{number}"))
        cluster.add("far")  # its processes have the environment of now

    def start(name):
        monkeypatch.setenv("IP2P_CACHE", str(tmp_path / "disk-driver"))
        return cluster.start(
            DRIVER, "train", uri, f"{bucket}/{name}", tiny_weights, str(STEPS), "far", log=log
        )

    add(0)
    add(1)
    cluster.cluster.wait_for_nodes()
    cluster.finish(start("undisturbed"), log)
    driver = start("killed")
    cluster.wait(driver, log, lambda: len(read_metrics(f"{bucket}/killed/checkpoints")) >= NOTED)
    cluster.kill("far")
    assert len(read_metrics(f"{bucket}/killed/checkpoints")) < STEPS
    add(2)
    cluster.finish(driver, log)
    assert "goes on at the newest checkpoint after a failure" in log.read_text()
    difference = compared(f"{bucket}/killed", f"{bucket}/undisturbed")
    copies = {path.parts[-4] for path in tmp_path.glob("disk-*/datasets/*/part-00000.parquet")}
    assert copies == {"disk-0", "disk-1", "disk-2"}
    assert cluster.where("RayTrainWorker") >= {"far"}
    logger.info("largest difference of a loss: %g", difference)
