"""Of all who want a lease one has it, and one whose holder was killed is taken over."""

import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from ip2p_ray import lease, objects
from ip2p_ray.errors import StageError
from ip2p_ray.testing import FaultyWay, WayFaults

HOLDS = """
import sys, time
from ip2p_ray import lease
with lease.held(sys.argv[1], beat_s=float(sys.argv[2]), gone_s=float(sys.argv[3])):
    print("held", flush=True)
    sys.stdin.read()
    print("went on", flush=True)
"""


@pytest.fixture
def holder(bucket):
    """Starts a process that holds the lease."""
    started = []

    def start(uri, beat_s, gone_s=60.0):
        command = [sys.executable, "-c", HOLDS, uri, str(beat_s), str(gone_s)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(command, text=True, **pipes)
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


def test_a_lease_is_taken_over_when_what_its_dead_holder_left_is_gone(bucket, holder):
    uri = f"{bucket}/run/.lock"
    process = holder(uri, 60.0)
    process.kill()
    began = time.monotonic()
    with lease.held(uri, gone_s=3600.0, beat_s=0.4, lingers_s=1.0):
        assert time.monotonic() - began >= 1.0
        assert objects.size(uri) > 0
    assert objects.size(uri) is None
    process.wait()


@pytest.mark.parametrize("said", ["elsewhere", "nothing", "alive"])
def test_a_holder_that_is_not_seen_to_have_died_is_waited_for(bucket, holder, said):
    uri = f"{bucket}/run/.lock"
    process = holder(uri, 60.0)
    process.kill()
    process.wait()
    told = json.loads(objects.read(uri))
    if said == "elsewhere":
        told["machine"] = "another machine"
    elif said == "nothing":
        told = {"holder": told["holder"]}
    else:  # a process that is there, of which nothing is known
        told |= {"process": os.getpid(), "started": lease._started(os.getpid())}
    objects.write(uri, json.dumps(told).encode())
    began = time.monotonic()
    with lease.held(uri, gone_s=2.0, lingers_s=0.0):
        assert time.monotonic() - began > 2.0


def test_a_process_that_has_the_number_of_a_dead_holder_is_not_waited_for(bucket, holder):
    uri = f"{bucket}/run/.lock"
    process = holder(uri, 60.0)
    process.kill()
    process.wait()
    told = json.loads(objects.read(uri)) | {"process": os.getpid()}
    objects.write(uri, json.dumps(told).encode())
    with lease.held(uri, gone_s=3600.0, lingers_s=0.0):
        assert objects.size(uri) > 0


def test_one_that_was_silent_too_long_is_told_that_it_lost_it(bucket):
    uri = f"{bucket}/run/.lock"
    silent = lease.held(uri, beat_s=3600.0, gone_s=7200.0)
    silent.__enter__()
    told = json.loads(objects.read(uri)) | {"started": "0"}  # as if it were seen to have died
    objects.write(uri, json.dumps(told).encode())
    with lease.held(uri, gone_s=3600.0, lingers_s=0.0):
        with pytest.raises(StageError, match="was taken over by another run"):
            silent.__exit__(None, None, None)
        assert objects.size(uri) > 0
    assert objects.size(uri) is None


def test_a_run_whose_lease_was_taken_over_is_ended(bucket, holder):
    uri = f"{bucket}/run/.lock"
    process = holder(uri, 0.1)
    ends = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < ends:
        objects.write(uri, b"another's")  # again: a beat that was on its way may come after it
        time.sleep(0.2)
    process.wait(1)  # its input stays open
    said, error = process.stdout.read(), process.stderr.read()
    assert "StageError" in error
    assert "was taken over by another run" in error
    assert said == ""
    assert objects.read(uri) == b"another's"


def test_a_loss_that_is_seen_just_as_the_block_ends_is_told_too(bucket, monkeypatch):
    def interrupted(self):
        self.lost = True
        lease._interrupt()
        time.sleep(60)

    monkeypatch.setattr(lease._Lease, "leave", interrupted)
    told = "was taken over by another run"
    with pytest.raises(StageError, match=told), lease.held(f"{bucket}/run/.lock"):
        pass


def test_a_run_that_does_not_reach_its_lease_is_ended(bucket, bucket_endpoint, holder, monkeypatch):
    with FaultyWay(bucket_endpoint) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        process = holder(f"{bucket}/run/.lock", 0.2, 2.0)
        way.faults = WayFaults(hang_up=1.0)
        process.wait(60)
        said, error = process.stdout.read(), process.stderr.read()
    assert "did not reach it for 2 s" in error
    assert said == ""


def test_answers_that_are_lost_cost_no_lease(bucket, bucket_endpoint, monkeypatch):
    faults = WayFaults(lost=0.4, methods=("PUT",))
    with FaultyWay(bucket_endpoint, faults, seed=1) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        with lease.held(f"{bucket}/run/.lock", beat_s=0.05):
            until = way.counts["lost"] + 3
            while way.counts["lost"] < until:
                threading.Event().wait(0.05)
        assert objects.size(f"{bucket}/run/.lock") is None


def test_who_is_slow_to_ask_takes_it_from_nobody(bucket, holder, monkeypatch):
    """Its first request takes longer than a holder may be silent."""
    uri, write_if = f"{bucket}/run/.lock", objects.write_if
    process = holder(uri, 0.5)
    slow = iter([3600.0])
    late = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0], sleep=time.sleep)

    def write_slowly(*arguments):
        tag = write_if(*arguments)
        late[0] += next(slow, 0.0)
        return tag

    monkeypatch.setattr(lease, "time", clock)
    monkeypatch.setattr(objects, "write_if", write_slowly)
    told = f"another run is working in {bucket}/run; wait for it"
    with pytest.raises(StageError, match=told), lease.held(uri, gone_s=60.0):
        pass
    assert late == [3600.0]
    said, error = process.communicate("")
    assert (process.returncode, said) == (0, "went on\n"), error


def test_a_renewal_without_any_answer_costs_no_lease(bucket, bucket_endpoint, monkeypatch):
    uri = f"{bucket}/run/.lock"
    with FaultyWay(bucket_endpoint) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        with lease.held(uri, beat_s=0.2):
            way.faults = WayFaults(lost=1.0, methods=("PUT",))
            while way.counts["lost"] < 3:
                time.sleep(0.05)
            way.faults = WayFaults()
            written = way.counts["PUT"]
            while way.counts["PUT"] < written + 3:
                time.sleep(0.05)
        assert objects.size(uri) is None


def test_writes_that_were_under_way_together_cost_no_lease(bucket, bucket_endpoint, monkeypatch):
    uri = f"{bucket}/run/.lock"
    conflict = WayFaults(refusal=(409, "ConditionalRequestConflict"), methods=("PUT",))
    with FaultyWay(bucket_endpoint) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        with lease.held(uri, beat_s=0.2):
            way.faults, written = conflict, way.counts["PUT"]
            while way.counts["PUT"] < written + 11:  # more than one renewal tries
                time.sleep(0.05)
            way.faults, written = WayFaults(), way.counts["PUT"]
            while way.counts["PUT"] < written + 3:
                time.sleep(0.05)
        assert objects.size(uri) is None


def test_a_release_that_comes_too_late_deletes_nothing(bucket, monkeypatch):
    # By then the object may be the lock of whoever took it over.
    uri, read = f"{bucket}/run/.lock", objects.read_tagged

    def read_slowly(uri):
        found, now = read(uri), time.monotonic()
        monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now + 61.0))
        return found

    with lease.held(uri, gone_s=60.0):
        monkeypatch.setattr(objects, "read_tagged", read_slowly)
    assert objects.size(uri) > 0


def test_a_lock_that_cannot_be_deleted_ends_no_run_that_is_done(
    bucket, bucket_endpoint, monkeypatch, caplog
):
    with FaultyWay(bucket_endpoint) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        with lease.held(f"{bucket}/run/.lock"):
            way.faults = WayFaults(refusal=(403, "AccessDenied"))
    assert "the next run waits until this lock is old" in caplog.text


@pytest.mark.parametrize("content", ["", "null", "[]", "7", '{"process": -7}', "[" * 100_000])
def test_content_of_others_tells_of_no_death(content):
    told = content.replace("-7}", f'-7, "machine": {json.dumps(lease._machine())}}}')
    assert not lease._died(told.encode())
