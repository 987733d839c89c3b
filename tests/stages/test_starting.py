"""What is done when Ray does not start in time, as on a busy machine."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

from ip2p_ray.errors import StageError
from ip2p_ray.stages import starting


def late(monkeypatch, times, error="The current node timed out during startup.", beside=()):
    """A Ray that is late so many times and leaves a process each time; returns those."""
    left = []

    def init(**options):
        assert not any(psutil.pid_exists(process.pid) for process in left)
        if len(left) < times:
            command = [sys.executable, "-c", "import time; time.sleep(600)"]
            left.append(subprocess.Popen(command))
            raise Exception(error)

    def children():
        """Without those of a Ray that this process may have, which come and go."""
        pids = [process.pid for process in (*beside, *left)]
        return {psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)}

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(starting, "_children", children)
    return left


def none_left(processes):
    found = any(psutil.pid_exists(process.pid) for process in processes)
    for process in processes:
        process.kill()
        process.wait(10)
    return not found


@pytest.mark.parametrize(
    "error",
    [
        "The current node timed out during startup. This could happen because",
        "Timed out waiting for file /tmp/ray/session/gcs_server_port",
        "Failed to start GCS. Last 3 lines",
    ],
)
def test_a_ray_that_is_late_is_started_again_without_what_is_left_of_it(monkeypatch, error):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    left = late(monkeypatch, 2, error, beside=[other])
    starting.start(local=True)
    assert other.poll() is None
    other.kill()
    other.wait(10)
    assert len(left) == 2
    assert none_left(left)


def test_one_that_never_starts_is_told_in_a_sentence(monkeypatch):
    left = late(monkeypatch, 100)
    with pytest.raises(StageError, match="Ray did not start in 4 attempts: this machine is too"):
        starting.start(local=True)
    assert len(left) == 4
    assert none_left(left)


@pytest.mark.parametrize(
    ("local", "told"), [(True, "no cluster"), (False, "timed out during startup")]
)
def test_other_errors_and_those_of_other_clusters_are_raised(monkeypatch, local, told):
    asked = []

    def refusing(**options):
        asked.append(options)
        raise ConnectionError(told)

    monkeypatch.setattr(ray, "init", refusing)
    with pytest.raises(ConnectionError, match=told):
        starting.start(local=local, address="somewhere")
    assert asked == [{"address": "somewhere"}]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_ray_whose_agent_does_not_come_is_started_again():
    """In a process of its own: this one may have a Ray."""
    driver = Path(__file__).parent / "starting_driver.py"
    done = subprocess.run([sys.executable, driver], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *late, last = done.stdout.splitlines()  # more than one on a busy machine
    assert set(late) == {"Ray did not start in time; once more"}
    assert last == "17"
