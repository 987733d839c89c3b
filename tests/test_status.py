import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from ip2p_ray import status, storage
from ip2p_ray.errors import DatasetError, StageError
from ip2p_ray.notes import ORIGIN
from ip2p_ray.report import Report
from ip2p_ray.stages import run

ROOT = Path(__file__).parent.parent
NOW = 1_000_000.0

KILLED = """
import sys, time
from collections import Counter
from ip2p_ray.stages import attempts, run
from ip2p_ray.stages.progress import Progress

def build():
    progress = Progress("latents", total=50, unit="pairs")
    attempts.follow(progress)
    for done in range(1, 13):
        progress.update(done)
        time.sleep(0.01)
    progress.heard({"EncodePairs": 2.5}, Counter({None: 9, "held_out": 3}))
    print("working", flush=True)
    time.sleep(600)

run.make(sys.argv[1], run.Origin(dataset="latents", config={}), build, note_every_s=0.05)
"""


def write_note(folder, **now):
    content = {"dataset": "candidates", "attempts": [60.0, 30.0], "now": {"updated": NOW, **now}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ORIGIN).write_text(json.dumps(content))


def told(folder, now=NOW):
    """The status as people see it."""
    return "\n".join(status.lines(status.statuses(folder, now), now))


def test_a_whole_dataset_is_told_from_its_manifest(tmp_path):
    uri = str(tmp_path / "captions")
    report = Report(stage="captions", rows_in=5, rows_out=3, rejected={"short": 2}, seconds=0.5)

    def build():
        storage.write_shard(uri, "captions-00000", pa.table({"x": [1, 2, 3]}))
        return [report]

    run.make(uri, run.Origin(dataset="captions", config={}), build)
    (found,) = status.statuses(uri)
    assert (found.state, found.done, found.kept, found.rejected) == ("whole", 3, 3, {"short": 2})
    assert "kept 3 of 5 (60 %); rejected short 2" in told(uri)


def test_a_run_that_was_killed_shows_how_far_it_came(tmp_path):
    uri = str(tmp_path / "latents")
    driver = subprocess.Popen(
        [sys.executable, "-c", KILLED, uri],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert driver.stdout.readline() == "working\n"
    deadline = time.monotonic() + 60
    while status.statuses(uri)[0].kept is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert status.statuses(uri)[0].state == "working"
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    later = time.time() + 3600
    (found,) = status.statuses(uri, later)
    assert found.state == "silent"
    assert (found.done, found.total, found.unit, found.attempts) == (12, 50, "pairs", 1)
    assert (found.kept, found.rejected, found.busy) == (9, {"held_out": 3}, {"EncodePairs": 2.5})
    assert found.left_s > 0
    text = told(uri, later)
    assert "no sign of life since " in text
    assert "12 of 50 pairs (24 %)" in text


def test_time_left_is_by_the_rate_of_late(tmp_path):
    write_note(tmp_path, done=400, total=1000, unit="triplets", rate=0.5)
    (found,) = status.statuses(str(tmp_path), NOW + 5)
    assert (found.state, found.left_s, found.seconds) == ("working", 1200.0, 90.0)
    text = told(str(tmp_path), NOW + 5)
    assert "being made; 400 of 1,000 triplets (40 %), about 20.0 min left" in text
    assert "1.5 min in 2 attempts so far" in text


@pytest.mark.parametrize(
    ("ended", "state", "words"),
    [
        ("failed", "failed", "failed 2.0 min ago"),
        ("stopped", "stopped", "stopped 2.0 min ago"),
        ("", "silent", "no sign of life since"),
        ("made", "begun", "begun, not whole"),
    ],
)
def test_how_an_attempt_ended_is_told(tmp_path, ended, state, words):
    failures = [{"at": NOW - 9, "sentence": "disk full"}, {"at": NOW, "sentence": "no GPU"}]
    write_note(tmp_path, ended=ended, failures=failures)
    (found,) = status.statuses(str(tmp_path), NOW + 120)
    assert found.state == state
    text = told(str(tmp_path), NOW + 120)
    assert words in text
    assert "no GPU (and 1 before)" in text


def test_a_clock_that_is_ahead_is_told_and_some_difference_borne(tmp_path):
    write_note(tmp_path, host="far")
    assert "far, whose clock is 8.3 min ahead of the one here" in told(str(tmp_path), NOW - 500)
    assert status.statuses(str(tmp_path), NOW + 40)[0].state == "working"


def test_what_an_earlier_version_left_is_told_as_far_as_it_goes(tmp_path):
    (tmp_path / ORIGIN).write_text(json.dumps({"dataset": "pairs", "attempts": [30.0]}))
    (found,) = status.statuses(str(tmp_path))
    assert (found.state, found.seconds, found.done) == ("begun", 30.0, None)
    assert "begun, not whole" in told(str(tmp_path))


def test_a_runs_folder_lists_its_datasets_but_not_their_parts(tmp_path):
    for name in ("captions", "rejects/captions"):
        run.make(str(tmp_path / name), run.Origin(dataset=name, config={}), list)
    write_note(tmp_path / "candidates", done=1, total=2)
    write_note(tmp_path / "candidates" / "part-00000", done=1, total=2)
    found = status.statuses(str(tmp_path), NOW)
    heads = [line for line in status.lines(found, NOW) if not line.startswith(" ")]
    names = [line.partition(":")[0] for line in heads]
    assert names == ["captions", "rejects/captions", "candidates"]


def test_training_is_told_by_its_metrics_and_checkpoints(tmp_path):
    origin = {"dataset": "checkpoints", "config": {"steps": 100}, "attempts": [5.0]}
    (tmp_path / ORIGIN).write_text(json.dumps({**origin, "now": {"updated": NOW, "rate": 2.0}}))
    for step in (20, 40):
        (tmp_path / f"step-{step:08d}").mkdir()
    whole = json.dumps({"step": 50, "loss": 0.25, "images_per_s": 12.0})
    (tmp_path / "metrics.jsonl").write_text(f'{whole}\n{{"step": 60, "lo')
    (found,) = status.statuses(str(tmp_path), NOW)
    assert (found.done, found.total, found.left_s) == (50, 100, 25.0)
    assert found.training.checkpoint == 40
    assert "step 50, loss 0.25, images_per_s 12, newest checkpoint 40" in told(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"attempts": null}', '{"now": {"updated": null}}']
)
@pytest.mark.parametrize("file", [ORIGIN, storage.MANIFEST])
def test_one_damaged_file_does_not_hide_the_others(tmp_path, file, text):
    run.make(str(tmp_path / "captions"), run.Origin(dataset="captions", config={}), list)
    run.make(str(tmp_path / "pairs"), run.Origin(dataset="pairs", config={}), list)
    (tmp_path / "pairs" / file).write_text(text)
    states = {each.dataset: each.state for each in status.statuses(str(tmp_path))}
    assert states == {"captions": "whole", "pairs": "unreadable"}
    assert "cannot be read" in told(tmp_path)
    assert "delete" not in told(tmp_path)
    with pytest.raises(DatasetError, match="cannot be read"):
        status.statuses(str(tmp_path / "pairs"))


def test_lines_of_metrics_that_are_none_are_passed_over(tmp_path):
    (tmp_path / ORIGIN).write_text(json.dumps({"dataset": "checkpoints", "config": None}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5}\n5\n{"loss": "x"}\n{}\n')
    (found,) = status.statuses(str(tmp_path))
    assert (found.training.step, found.training.figures) == (7, {"loss": 0.5})


@pytest.mark.parametrize("name", ["", "nothing"])
def test_where_there_is_none_it_is_said(tmp_path, name):
    with pytest.raises(DatasetError, match="there is no"):
        status.statuses(str(tmp_path / name))


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_hidden_folders_are_no_part_of_a_run(tmp_path, bucket, place):
    uri = str(tmp_path) if place == "folder" else f"{bucket}/run"
    for name in ("captions", ".hidden/pairs", "rejects/.hidden"):
        run.make(f"{uri}/{name}", run.Origin(dataset=name, config={}), list)
    assert [each.dataset for each in status.statuses(uri)] == ["captions"]


def test_a_bucket_is_told_as_a_folder(bucket):
    run.make(f"{bucket}/run/captions", run.Origin(dataset="captions", config={}), list)

    def fail():
        raise StageError("no reply")

    with pytest.raises(StageError):
        run.make(f"{bucket}/run/replies", run.Origin(dataset="replies", config={}), fail)
    found = status.statuses(f"{bucket}/run")
    assert [(each.dataset, each.state) for each in found] == [
        ("captions", "whole"),
        ("replies", "failed"),
    ]
    assert found[1].failures[0]["sentence"] == "no reply"
