"""Nodes join and leave a run that was told it may have more workers than it begins with."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ip2p_ray import storage
from ip2p_ray.checkpoint import latest_checkpoint
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.latents import encode_pairs
from ip2p_ray.schema import LATENTS
from ip2p_ray.stages.training import read_metrics
from tests.nodes import started

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

DRIVER = Path(__file__).parent / "elastic_driver.py"
MANY, MORE = 100_000, 30


@pytest.fixture
def latents(tiny_weights, tmp_path):
    """A dataset of twelve pairs of noise."""
    model = StableDiffusion.load(tiny_weights / "generator")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 12, 64, 64, 3), dtype=np.uint8)
    rows = [
        {
            **dict.fromkeys(LATENTS.names),
            "pair_key": f"{number:02d}",
            "triplet_key": f"{number:02d}",
            "instruction": f"make it {number % 3}",
            "split": "train",
            **row,
        }
        for number, row in enumerate(encode_pairs(model, *pictures))
    ]
    uri = str(tmp_path / "latents")
    storage.write_shard(uri, "part-00000", pa.Table.from_pylist(rows, schema=LATENTS))
    storage.write_manifest(uri, storage.Manifest(dataset="latents", recipe="noise"))
    return uri


@pytest.fixture
def cluster(monkeypatch):
    """A head on which nothing runs, and a node with room for one worker."""
    from ray.cluster_utils import Cluster

    for name, value in {
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4",
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    }.items():
        monkeypatch.setenv(name, value)
    head = {"num_cpus": 0, "include_dashboard": False}
    found = started(lambda: Cluster(initialize_head=True, connect=False, head_node_args=head))
    started(lambda: found.add_node(num_cpus=1))
    yield found
    found.shutdown()


def test_workers_join_and_leave_between_checkpoints(cluster, tiny_weights, latents, tmp_path):
    out, log = tmp_path / "out", (tmp_path / "log").open("w")

    def start(steps):
        return subprocess.Popen(
            [sys.executable, DRIVER, tiny_weights, latents, out, str(steps)],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def workers():
        return [row["workers"] for row in read_metrics(out / "checkpoints")]

    def wait(condition):
        deadline = time.monotonic() + 240
        while not condition():
            assert driver.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)

    driver = start(MANY)
    wait(lambda: len(workers()) >= MORE)
    assert set(workers()) == {1}
    joined = started(lambda: cluster.add_node(num_cpus=1))
    wait(lambda: workers()[-1:] == [2] and workers().count(2) >= MORE)
    cluster.remove_node(joined, allow_graceful=False)
    wait(lambda: workers()[-1:] == [1])
    alone = len(workers())
    wait(lambda: len(workers()) >= alone + MORE)
    driver.kill()
    driver.wait()

    noted = read_metrics(out / "checkpoints")
    assert [row["step"] for row in noted] == list(range(1, len(noted) + 1))
    changes = [
        row["step"]
        for row, after in itertools.pairwise(noted)
        if row["workers"] != after["workers"]
    ]
    assert len(changes) == 2
    assert all(step % 10 == 0 for step in changes), (
        "a step was taken twice, or not from a checkpoint"
    )
    assert latest_checkpoint(out / "checkpoints") is not None
