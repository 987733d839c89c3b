import os
import subprocess
import sys
import time

import pytest

from ip2p_ray.benchmark.processes import Cost, Sample, watched

CODE = """
import sys, time
held = bytearray(b"x" * (int(sys.argv[1]) << 20))
print("ready", flush=True)
sys.stdin.readline()
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
        worker.stdin.write("go\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "worked\n"
    used = cost.cpu(cost.samples[0].at, cost.samples[-1].at)
    assert used.keys() == {"worker"}
    assert 0.3 < used["worker"] < 0.8
    assert 64 << 20 < cost.own["worker"] <= cost.rss["worker"] < 256 << 20


def test_those_below_have_the_role_of_their_name(worker):
    with watched({os.getpid(): "test"}, lambda names: f"a {min(names)}") as cost:
        pass
    assert set(cost.rss) >= {"test"}
    assert any(role.startswith("a python") for role in cost.rss)


def test_the_cost_of_a_part_is_that_between_two_moments():
    a, b, c = (1, 0.0), (2, 0.0), (3, 0.0)
    seen = [Sample(0.0, {a: 1.0}), Sample(1.0, {a: 2.0}), Sample(2.0, {a: 5.0, b: 1.0, c: 0.5})]
    cost = Cost(samples=seen, roles={a: "one", b: "other", c: "other"})
    assert cost.cpu(0.9, 2.4) == {"one": 3.0, "other": 1.5}


def test_one_that_has_ended_keeps_its_role():
    # Until its parent has waited for it, its command is gone, and of its name 15 letters are left.
    title = "ray::Worker(AskReplies)"
    code = f"open('/proc/self/comm', 'w').write({title!r}[:15]); input()"
    command = {"args": [title, "-c", code], "executable": sys.executable}
    names = set()

    def role(seen):
        names.update(seen)
        return "actor" if title in seen else "other"

    with (
        subprocess.Popen(**command, stdin=subprocess.PIPE) as worker,
        watched({os.getpid(): "test"}, role, every_s=0.01) as cost,
    ):
        wait_until(lambda: "actor" in cost.rss)
        worker.kill()
        wait_until(lambda: title[:15] in names)
    assert set(cost.rss) >= {"test", "actor"}
    assert "actor" in cost.cpu(cost.samples[0].at, cost.samples[-1].at)


def wait_until(true):
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)
