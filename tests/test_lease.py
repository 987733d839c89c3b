"""Of all who want a lease one has it, and one whose holder was killed is taken over."""

import subprocess
import sys
import threading

import pytest

from ip2p_ray import lease, objects
from ip2p_ray.errors import StageError
from ip2p_ray.testing import FaultyWay, WayFaults

HOLDS = """
import sys, time
from ip2p_ray import lease
with lease.held(sys.argv[1], beat_s=float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(bucket):
    """Starts a process that holds the lease."""
    started = []

    def start(uri, beat_s):
        command = [sys.executable, "-c", HOLDS, uri, str(beat_s)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_lease_is_gone_when_its_block_has_ended(bucket):
    uri = f"{bucket}/run/.lock"
    for _ in range(2):
        with lease.held(uri):
            assert objects.size(uri) > 0
        assert objects.size(uri) is None


def test_a_lease_that_is_held_is_not_given(bucket, holder):
    uri = f"{bucket}/run/.lock"
    process = holder(uri, 0.1)
    told = f"another run is working in {bucket}/run; wait for it"
    with pytest.raises(StageError, match=told), lease.held(uri, gone_s=60.0):
        pass
    process.communicate("")
    assert process.returncode == 0
    with lease.held(uri):
        pass


def test_a_lease_whose_holder_was_killed_is_taken_over(bucket, holder):
    uri = f"{bucket}/run/.lock"
    process = holder(uri, 60.0)
    process.kill()
    process.wait()
    assert objects.size(uri) > 0
    with lease.held(uri, gone_s=0.5):
        assert objects.size(uri) > 0
    assert objects.size(uri) is None


def test_one_that_was_silent_too_long_is_told_that_it_lost_it(bucket):
    uri = f"{bucket}/run/.lock"
    silent = lease.held(uri, beat_s=60.0)
    silent.__enter__()
    with lease.held(uri, beat_s=0.2, gone_s=0.4):
        with pytest.raises(StageError, match="was taken over by another run"):
            silent.__exit__(None, None, None)
        assert objects.size(uri) > 0
    assert objects.size(uri) is None


def test_answers_that_are_lost_cost_no_lease(bucket, bucket_endpoint, monkeypatch):
    faults = WayFaults(lost=0.4, methods=("PUT",))
    with FaultyWay(bucket_endpoint, faults, seed=1) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        with lease.held(f"{bucket}/run/.lock", beat_s=0.05, gone_s=0.1):
            until = way.counts["lost"] + 3
            while way.counts["lost"] < until:
                threading.Event().wait(0.05)
        assert objects.size(f"{bucket}/run/.lock") is None
