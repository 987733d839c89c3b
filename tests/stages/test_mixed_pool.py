"""Generators with a GPU and without in one pool; the GPU is claimed, nothing computes on it."""

import subprocess
import sys
from pathlib import Path

import pytest

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError
from ip2p_ray.schema import SCORES
from ip2p_ray.stages.run import Resources

DRIVER = Path(__file__).parent / "mixed_driver.py"


@pytest.mark.ray
def test_generators_with_and_without_a_gpu_share_the_work(tmp_path):
    done = subprocess.run(
        [sys.executable, DRIVER, tmp_path], capture_output=True, text=True, timeout=840, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    devices = sorted(path.read_text() for path in tmp_path.glob("*.device"))
    assert devices == ["cpu", "cpu", "cuda"]
    assert len(storage.read_dataset(str(tmp_path / "scores"), SCORES)) == 4 * 24


def test_actors_without_a_gpu_stand_beside_some_with_one():
    with pytest.raises(ConfigError, match="stands beside actors with gpus"):
        Resources(cpu_actors=1)
    assert Resources(actors=2, cpus=0.5, gpus=1, cpu_actors=3, cpu_actor_cpus=4).all_cpus == 13
