"""What is done when Ray does not start in time, as on a busy machine."""

import contextlib
import subprocess
import sys
import threading
import time

import psutil
import pytest
import ray

from ip2p_ray.errors import StageError
from ip2p_ray.stages import starting


def late(monkeypatch, times):
    """A Ray that is late so many times and leaves a process each time; returns those."""
    left = []

    def init(**options):
        assert not any(psutil.pid_exists(process.pid) for process in left)
        if len(left) < times:
            command = [sys.executable, "-c", "import time; time.sleep(600)"]
            left.append(subprocess.Popen(command))
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", init)
    return left


def none_left(processes):
    found = any(psutil.pid_exists(process.pid) for process in processes)
    for process in processes:
        process.kill()
        process.wait(10)
    return not found


def test_a_ray_that_is_late_is_started_again_without_what_is_left_of_it(monkeypatch):
    left = late(monkeypatch, 2)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        starting.start(local=True)
        assert other.poll() is None
        other.communicate(b"\n")
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
    assert not psutil.Process().children()


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_ray_whose_agent_does_not_come_is_started_again(caplog):
    from ip2p_ray.stages.run import local_ray

    stopped = []

    def stop_one():
        while not stopped:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(part.endswith("dashboard/agent.py") for part in process.cmdline()):
                        process.suspend()
                        stopped.append(process)
                        return
            time.sleep(0.02)

    caplog.set_level("INFO", logger="ip2p_ray")
    watching = threading.Thread(target=stop_one, daemon=True)
    watching.start()
    with local_ray(workers=1):
        assert ray.get(ray.remote(num_cpus=0.5)(lambda: 17).remote()) == 17
        assert "Ray did not start in time; once more" in caplog.text
    for process in stopped:  # its parent has died, and nobody could tell whose it was
        process.kill()
