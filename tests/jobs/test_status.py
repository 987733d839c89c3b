import json
import re
import subprocess
import sys

from ip2p_ray.stages import run
from tests.jobs.running import ROOT, Job

JOB = Job("status.py")

FLAGS = {"--dataset", "--json", "--watch"}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def test_the_flags_are_these():
    done = JOB.run("--help")
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


def test_it_prints_lines_or_an_object(tmp_path):
    run.make(str(tmp_path / "captions"), run.Origin(dataset="captions", config={}), list)
    assert JOB.run("--dataset", tmp_path).stdout.startswith("captions: whole")
    found = json.loads(JOB.run("--dataset", tmp_path, "--json").stdout)
    assert [each["state"] for each in found["datasets"]] == ["whole"]


def test_it_watches_until_the_dataset_is_whole(tmp_path):
    uri = tmp_path / "captions"
    run.make(str(uri), run.Origin(dataset="captions", config={}), list)
    done = JOB.run("--dataset", uri, "--watch", "0.1", timeout=600)
    assert (done.returncode, done.stdout.count("whole")) == (0, 1)


def test_it_watches_what_is_not_there_yet(tmp_path):
    uri = tmp_path / "captions"
    watch = subprocess.Popen(
        [sys.executable, ROOT / "jobs" / "status.py", "--dataset", uri, "--watch", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watch.stderr.readline().startswith("status: there is no ")
    run.make(str(uri), run.Origin(dataset="captions", config={}), list)
    output, _ = watch.communicate(timeout=600)
    assert (watch.returncode, "whole" in output) == (0, True)


def test_what_is_not_there_is_told_in_a_sentence(tmp_path):
    done = JOB.run("--dataset", tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("status: there is no ")
    assert JOB.run("--dataset", "http://x/y").returncode == 2
