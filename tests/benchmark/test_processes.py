import os
import subprocess
import sys

import pytest

from ip2p_ray.benchmark.processes import Cost, Sample, watched

CODE = """
import sys, time
held = bytearray(b"x" * (int(sys.argv[1]) << 20))
print("ready", flush=True)
until = time.process_time() + 0.5
while time.process_time() < until:
    pass
print("worked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def worker():
    """A process that holds 64 MiB and works for half a second."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CODE, "64"], text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def test_cpu_time_and_memory_are_counted_by_role(worker):
    with watched({worker.pid: "worker"}, str, every_s=0.02) as cost:
        assert worker.stdout.readline() == "worked\n"
    used = cost.cpu(cost.samples[0].at, cost.samples[-1].at)
    assert used.keys() == {"worker"}
    assert 0.3 < used["worker"] < 0.8
    assert 64 << 20 < cost.own["worker"] <= cost.rss["worker"] < 256 << 20


def test_those_below_have_the_role_of_their_name(worker):
    with watched({os.getpid(): "test"}, lambda name: f"a {name}") as cost:
        pass
    assert set(cost.rss) >= {"test"}
    assert any(role.startswith("a python") for role in cost.rss)


def test_the_cost_of_a_part_is_that_between_two_moments():
    seen = [Sample(0.0, {"a": 1.0}), Sample(1.0, {"a": 2.0}), Sample(2.0, {"a": 5.0, "b": 1.0})]
    assert Cost(samples=seen).cpu(0.9, 2.4) == {"a": 3.0, "b": 1.0}
