import io
import json
import logging
import os
import subprocess
import sys
import threading
from contextvars import copy_context
from pathlib import Path

import pytest

from ip2p_ray import logs

ROOT = Path(__file__).parent.parent

RUN = """
import sys, threading, time
from ip2p_ray.errors import StageError
from ip2p_ray.report import Report
from ip2p_ray.stages import run
from ip2p_ray.stages.progress import Progress, shown

def part():
    progress = Progress("candidates, part 2 of 7", total=5, unit="triplets")
    polled = threading.Event()
    with shown(progress, lambda: polled.set() or 3, every_s=0.0, poll_s=0.01, screen=sys.stdout):
        polled.wait(60)
        time.sleep(0.2)
    return [Report(stage="candidates", rows_in=5, rows_out=5, rejected={}, seconds=1.0)]

def fail():
    raise StageError("nothing is left")

def work():
    folder = sys.argv[1]
    print("to begin with\\nsome lines")
    whole = run.Origin(dataset="candidates", config={})
    of_part = run.Origin(dataset="candidates, part 2 of 7", config={})
    run.make(folder, whole, lambda: run.make(folder + "/part-1", of_part, part) and [])
    print("done", end="")
    run.make(folder + "/pairs", run.Origin(dataset="pairs", config={}), fail)

sys.exit(run.guarded("generate_pairs", work))
"""


@pytest.fixture
def stream():
    """Where lines of this package go while the test runs, as objects."""
    written, ours = io.StringIO(), logging.getLogger("ip2p_ray")
    handler, level = logging.StreamHandler(written), ours.level
    handler.setFormatter(logs.JsonLines())
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    yield written
    ours.removeHandler(handler)
    ours.setLevel(level)


def objects(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_what_it_is_of(stream):
    log = logging.getLogger("ip2p_ray.anything")
    with logs.about(dataset="pairs", stage="pairs"):
        with logs.about(part="2 of 7"):
            log.warning("kept %d\nof them", 3)
        log.info("more")
    first, second = objects(stream)
    names = {"dataset": "pairs", "stage": "pairs", "part": "2 of 7"}
    assert first.pop("time").endswith("+00:00")
    assert first == {"level": "warning", "message": "kept 3\nof them", **names}
    assert "part" not in second


def test_a_thread_that_copies_the_context_is_of_the_same(stream):
    log = logging.getLogger("ip2p_ray.anything")
    with logs.about(dataset="pairs"):
        thread = threading.Thread(target=copy_context().run, args=(log.info, "from afar"))
        thread.start()
        thread.join()
    assert objects(stream)[0]["dataset"] == "pairs"


def test_an_exception_stays_in_its_line(stream):
    try:
        raise ValueError("told")
    except ValueError:
        logging.getLogger("ip2p_ray.anything").exception("failed")
    (line,) = objects(stream)
    assert "ValueError: told" in line["exception"]


def lines_of(tmp_path, **environment):
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path / "candidates"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=600,
    )
    sentence = "" if environment else "generate_pairs: nothing is left\n"
    assert (done.returncode, done.stderr) == (1, sentence)
    return done.stdout.splitlines()


def test_every_line_of_a_run_is_an_object_that_names_the_dataset(tmp_path):
    found = [json.loads(line) for line in lines_of(tmp_path, IP2P_LOG="json")]
    assert {line["job"] for line in found} == {"generate_pairs"}
    told = {line["message"]: line for line in found}
    assert [*told][:2] == ["to begin with", "some lines"]
    assert told["done"]["level"] == "info"
    assert told["nothing is left"]["level"] == "error"
    assert told["nothing is left"]["dataset"] == "pairs"
    of_part = [line for line in found if line.get("part") == "2 of 7"]
    assert {line["dataset"] for line in of_part} == {"candidates"}
    messages = [line["message"] for line in of_part]
    assert any(message.startswith("candidates, part 2 of 7: 3 of 5") for message in messages)
    assert any(message.startswith("candidates: kept 5 of 5") for message in messages)


FOLLOW = """
import sys
import pyarrow as pa
from ip2p_ray import logs, storage

logs.follow(dataset="pairs", stage="pairs", actor="Generate")
storage.write_shard(sys.argv[1], "pairs-00000", pa.table({"key": ["a", "b"]}))
try:
    with logs.about(dataset="latents"):
        storage.read_table(sys.argv[1] + "/broken.parquet")
except pa.ArrowInvalid as error:
    print(logs.about_error(error))
"""


@pytest.mark.parametrize("kind", ["json", "text"])
def test_a_process_of_rays_has_its_lines_and_they_name_the_shard(tmp_path, kind):
    (tmp_path / "broken.parquet").write_bytes(b"no Parquet")
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "IP2P_LOG": kind},
        timeout=600,
    )
    names = {"dataset": "pairs", "stage": "pairs", "actor": "Generate"}
    if kind == "json":
        (line,) = [json.loads(line) for line in done.stderr.splitlines()]
        del line["time"]
        told = {"level": "debug", "message": "2 rows are written"}
        assert line == {**told, **names, "shard": "pairs-00000.parquet"}
    else:
        assert done.stderr == ""
    assert done.stdout.strip() == str({"dataset": "latents", "shard": "broken.parquet"})


def test_for_people_lines_stay_text(tmp_path):
    lines = lines_of(tmp_path)
    assert lines[0] == "to begin with"
    assert any(" candidates: kept 5 of 5" in line for line in lines)


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [("KeyboardInterrupt", 130, "stopped; "), ("ZeroDivisionError", 1, "ZeroDivisionError")],
)
def test_what_ends_a_job_is_an_object_too(raised, status, text):
    code = f"""
import sys
from ip2p_ray.stages import run

def work():
    raise {raised}

sys.exit(run.guarded("generate_pairs", work))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "IP2P_LOG": "json"},
        timeout=600,
    )
    (line,) = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
    assert done.returncode == status
    assert line["message"].startswith(text)
    assert line["job"] == "generate_pairs"
