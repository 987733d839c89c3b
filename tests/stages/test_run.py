import errno
import json
import os
import pickle
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray.train

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError, DatasetError, ModelError, StageError
from ip2p_ray.report import Report
from ip2p_ray.stages import run

ORIGIN = run.Origin(dataset="captions", config={"count": 3, "range": (0.1, 0.9)})
REPORT = Report(stage="captions", rows_in=3, rows_out=2, rejected={"empty": 1}, seconds=0.5)


def builder(calls):
    def build():
        calls.append("built")
        return [REPORT]

    return build


def test_a_dataset_is_made_once(tmp_path):
    calls = []
    for _ in range(2):
        manifest = run.make(str(tmp_path / "captions"), ORIGIN, builder(calls))
    assert calls == ["built"]
    assert manifest.recipe == ORIGIN.digest
    assert manifest.reports == [REPORT.as_dict()]


def test_a_build_that_fails_leaves_no_whole_dataset_and_is_repeated(tmp_path):
    uri, calls = str(tmp_path / "captions"), []

    def fail():
        raise StageError("nothing came out")

    with pytest.raises(StageError, match="nothing came out"):
        run.make(uri, ORIGIN, fail)
    with pytest.raises(DatasetError, match="not whole"):
        storage.read_manifest(uri)
    run.make(uri, ORIGIN, builder(calls))
    assert calls == ["built"]


@pytest.mark.parametrize("whole", [True, False])
def test_another_config_in_the_same_folder_is_refused_and_said(tmp_path, whole):
    uri = str(tmp_path / "captions")
    if whole:
        run.make(uri, ORIGIN, builder([]))
    else:
        with pytest.raises(StageError):
            run.make(uri, ORIGIN, lambda: (_ for _ in ()).throw(StageError("stopped")))
    other = replace(ORIGIN, config={**ORIGIN.config, "count": 4})
    with pytest.raises(DatasetError, match=r"captions.*count 3 there, 4 now.*--out.*delete"):
        run.make(uri, other, builder([]))


def test_another_source_is_refused_too(tmp_path):
    uri = str(tmp_path / "pairs")
    run.make(uri, replace(ORIGIN, sources={"triplets": "a"}), builder([]))
    with pytest.raises(DatasetError, match="triplets 'a' there, 'b' now"):
        run.make(uri, replace(ORIGIN, sources={"triplets": "b"}), builder([]))


def test_a_dataset_without_its_origin_is_known_by_its_manifest(tmp_path):
    uri = str(tmp_path / "captions")
    run.make(uri, ORIGIN, builder([]))
    (tmp_path / "captions" / run.ORIGIN).unlink()
    assert run.make(uri, ORIGIN, builder([])).recipe == ORIGIN.digest
    with pytest.raises(DatasetError, match="was made differently"):
        run.make(uri, replace(ORIGIN, config={"count": 4}), builder([]))


def test_an_unreadable_origin_names_its_file(tmp_path):
    (tmp_path / run.ORIGIN).write_text("{", encoding="utf-8")
    with pytest.raises(DatasetError, match=run.ORIGIN):
        run.make(str(tmp_path), ORIGIN, builder([]))


def test_notes_of_a_deleted_dataset_are_forgotten(tmp_path):
    uri = str(tmp_path / "pairs")
    notes = Path(run.resume_folder(uri))
    notes.mkdir(parents=True)
    seen = []
    run.make(uri, ORIGIN, lambda: seen.append(notes.exists()) or [])
    assert seen == [False]


def test_the_origin_is_written_before_the_rows(tmp_path):
    uri, found = tmp_path / "captions", []

    def build():
        found.append(json.loads((uri / run.ORIGIN).read_text(encoding="utf-8")))
        return []

    run.make(str(uri), ORIGIN, build)
    assert found[0]["digest"] == ORIGIN.digest
    assert found[0]["config"] == {"count": 3, "range": [0.1, 0.9]}


def test_the_seconds_of_stopped_attempts_count(tmp_path):
    """An attempt is noted while it runs, so that kill -9 loses little of it."""
    uri, noted = str(tmp_path / "captions"), []

    def spent():
        return json.loads((tmp_path / "captions" / run.ORIGIN).read_text())["attempts"]

    def stopped():
        while not spent()[-1]:
            pass
        noted.append(spent()[-1])
        raise StageError("stopped")

    for count in (1, 2):
        with pytest.raises(StageError):
            run.make(uri, ORIGIN, stopped, note_every_s=0.01)
        assert len(spent()) == count
    earlier = []
    manifest = run.make(uri, ORIGIN, lambda: earlier.append(run.earlier_seconds(uri)) or [])
    assert earlier[0] >= sum(noted) > 0
    assert manifest.wall_seconds >= earlier[0]
    assert storage.read_manifest(uri).wall_seconds == manifest.wall_seconds


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="give another --out"), run.locked(place):
            pass


def test_a_lock_clears_away_what_a_kill_left(tmp_path):
    """Here the kill fell between the two renames of a replacement."""
    left = tmp_path / "deep" / ".editor.partial"
    for part in ("new", "old"):
        (left / part).mkdir(parents=True)
        (left / part / "weights").write_text(part)
    (tmp_path / ".metrics.json.partial").mkdir()
    with run.locked(tmp_path):
        assert (tmp_path / "deep" / "editor" / "weights").read_text() == "new"
        names = {path.name for path in tmp_path.rglob("*")}
        assert names == {".lock", "deep", "editor", "weights"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_the_cores_are_those_this_process_may_use():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert run.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert run.usable_cores() == len(allowed)


def test_a_folder_is_locked_against_a_second_run(tmp_path):
    with (
        run.locked(tmp_path / "out"),
        pytest.raises(StageError, match="another run"),
        run.locked(tmp_path / "out"),
    ):
        pass
    with run.locked(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (None, 0, ""),
        (ModelError("folder x is broken"), 1, "job: folder x is broken\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            1,
            "job: /data/x: No space left on device; once that is mended the same command goes on\n",
        ),
        (KeyboardInterrupt(), 130, "job: stopped; the same command goes on from here\n"),
    ],
)
def test_a_job_ends_with_a_status_and_a_sentence(capsys, raised, status, told):
    def work():
        if raised is not None:
            raise raised

    assert run.guarded("job", work) == status
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("bug", [ZeroDivisionError, FileNotFoundError(errno.ENOENT, "no", "f")])
def test_a_bug_is_raised_and_not_told(bug):
    def work():
        raise bug

    with pytest.raises(bug if isinstance(bug, type) else type(bug)):
        run.guarded("job", work)


def test_the_own_error_behind_others_is_found():
    error = RuntimeError("a worker died")
    error.__cause__ = ModelError("the cause")
    assert str(run.own_error(error)) == "the cause"
    assert run.own_error(ValueError("else")) is None


def test_the_own_error_of_one_worker_is_found_behind_those_of_others():
    failures = {0: RuntimeError("connection closed by peer"), 1: ModelError("the cause")}
    error = ray.train.WorkerGroupError("text", failures)
    assert str(run.own_error(error)) == "the cause"


@pytest.mark.parametrize(
    "changes",
    [{"actors": 0}, {"batch_size": 0}, {"cpus": -1}, {"custom": (("CPU", 1.0),)}],
)
def test_resources_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError):
        run.Resources(**changes)


def test_what_travels_to_workers_can_be_pickled():
    for value in (ORIGIN, run.Resources(), run.Resources(custom=(("clip", 1.0),))):
        assert pickle.loads(pickle.dumps(value)) == value


def test_custom_resources_are_held_by_every_actor_of_a_mixed_pool():
    held = run.Resources(actors=2, gpus=0.5, cpu_actors=3, custom=(("generator", 0.25),))
    assert held.in_all == {"GPU": 1.0, "generator": 1.25}
    assert held.of_worker == {"CPU": 0.5, "GPU": 0.5, "generator": 0.25}
    assert held.of_task == {"num_cpus": 0.5, "num_gpus": 0.5, "resources": {"generator": 0.25}}
    assert hash(held) == hash(replace(held))


@pytest.mark.ray
def test_a_local_ray_has_no_custom_resources_and_says_so(local_ray, monkeypatch, caplog):
    held = run.Resources(actors=2, custom=(("generator", 1.0),))
    told = "want 2 of the custom resource generator (2 x 1), the cluster has 0"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=re.escape(told)):
        run._require_held([run.Resources(), held])
    monkeypatch.setenv("RAY_ADDRESS", "a cluster that may grow")
    with caplog.at_level("WARNING", logger="ip2p_ray"):
        run._require_held([run.Resources(), held])
    assert told in caplog.text


@pytest.mark.ray
def test_a_local_ray_listens_on_this_machine_only(local_ray):
    """Whoever reaches one of its ports has it run what they like."""
    own = psutil.Process()
    ours = [own, *own.children(recursive=True)]
    found = []
    for process in ours:
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found += [
                (process.name(), each.laddr)
                for each in process.net_connections(kind="inet")
                if each.status == psutil.CONN_LISTEN
            ]
    assert {name for name, _ in found} >= {"gcs_server", "raylet"}
    reached = [
        (name, address)
        for name, address in found
        if address.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ]
    assert not reached
