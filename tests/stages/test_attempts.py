"""What is noted of attempts, read back from storage."""

import json
from collections import Counter

import pytest

from ip2p_ray import notes
from ip2p_ray.errors import DatasetError, ModelError, StageError
from ip2p_ray.stages import attempts, run
from ip2p_ray.stages.progress import Progress

CANDIDATES = run.Origin(dataset="candidates", config={})
PART = run.Origin(dataset="candidates, part 1 of 2", config={}, sources={"part": "0"})


def noted(uri):
    return notes.read_noted(str(uri)).note


def test_an_attempt_that_fails_leaves_its_sentence(tmp_path):
    def fail():
        raise ModelError("folder x is broken\nand more")

    with pytest.raises(ModelError):
        run.make(str(tmp_path / "d"), CANDIDATES, fail)
    note = noted(tmp_path / "d")
    assert note.ended == "failed"
    assert [each["sentence"] for each in note.failures] == ["folder x is broken"]


def test_a_bug_is_named_by_its_kind(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run.make(str(tmp_path / "d"), CANDIDATES, lambda: 1 // 0)
    assert noted(tmp_path / "d").failures[0]["sentence"].startswith("ZeroDivisionError: ")


def test_failures_of_earlier_attempts_are_kept_the_newest_last(tmp_path):
    for number in range(notes.MOST_FAILURES + 2):
        with pytest.raises(StageError):
            run.make(str(tmp_path / "d"), CANDIDATES, _failing(StageError(str(number))))
    seen = [each["sentence"] for each in noted(tmp_path / "d").failures]
    assert seen == ["2", "3", "4", "5", "6"]
    run.make(str(tmp_path / "d"), CANDIDATES, list)
    note = noted(tmp_path / "d")
    assert note.ended == "made"
    assert len(note.failures) == notes.MOST_FAILURES


def test_a_submitted_job_is_named(tmp_path, monkeypatch):
    told = {"metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(told))
    run.make(str(tmp_path / "d"), CANDIDATES, list)
    assert noted(tmp_path / "d").job == "raysubmit_1"


def test_it_is_made_once_its_manifest_is_there(tmp_path):
    def cut():
        (tmp_path / "d" / "rows-0.parquet").write_bytes(b"PAR1")
        return []

    with pytest.raises(DatasetError, match="no whole Parquet file"):
        run.make(str(tmp_path / "d"), CANDIDATES, cut)
    note = noted(tmp_path / "d")
    assert note.ended == "failed"
    assert "rows-0.parquet is no whole" in note.failures[0]["sentence"]


def test_ctrl_c_is_no_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run.make(str(tmp_path / "d"), CANDIDATES, _failing(KeyboardInterrupt()))
    assert (noted(tmp_path / "d").ended, noted(tmp_path / "d").failures) == ("stopped", [])


def _failing(error):
    def build():
        raise error

    return build


def test_progress_within_a_part_is_that_of_the_whole_too(tmp_path):
    """Of 30 triplets 20 are in whole parts, and 4 of the last part are done, when it is killed."""
    whole, part = str(tmp_path / "candidates"), str(tmp_path / "candidates" / "part-00001")
    seen = []

    def build_part():
        progress = Progress("p", total=10, unit="triplets", done=1, verdicts={None: 2, "dull": 1})
        attempts.follow(progress)
        progress.heard({"Maker": 3.0}, Counter({None: 1, "image": 5}))
        progress.update(4)
        raise StageError("stopped")

    def build():
        attempts.count(20, 30, "triplets", Counter({None: 7, "image": 2}))
        run.make(part, PART, build_part)

    for _ in range(2):
        with pytest.raises(StageError):
            run.make(whole, CANDIDATES, build)
        seen.append((noted(part), noted(whole)))
    of_part, of_whole = seen[0]
    assert (of_part.done, of_part.total, of_part.kept) == (4, 10, 3)
    assert of_part.rejected == {"image": 5, "dull": 1}
    assert (of_whole.done, of_whole.total, of_whole.kept) == (24, 30, 10)
    assert of_whole.rejected == {"image": 7, "dull": 1}
    assert of_part.busy == of_whole.busy == {"Maker": 3.0}
    again = seen[1]
    assert again[0].busy == again[1].busy == {"Maker": 6.0}  # seconds of both attempts
    assert (again[1].done, again[1].kept) == (24, 10)  # but no row twice
