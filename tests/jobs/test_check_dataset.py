import re

import pyarrow as pa
import pytest

from ip2p_ray import storage
from ip2p_ray.schema import CANDIDATES, TRIPLETS
from tests.jobs.running import Job

run_job = Job("check_dataset.py").run

FLAGS = {"--dataset", "--source", "--ledger"}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def write(uri, name, schema, keys):
    rows = [{**dict.fromkeys(schema.names), "triplet_key": key} for key in keys]
    storage.write_shard(uri, "part-00000", pa.Table.from_pylist(rows, schema=schema))
    storage.write_manifest(uri, storage.Manifest(dataset=name, recipe="r"))


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    return str(tmp_path) if request.param == "folder" else request.getfixturevalue("bucket")


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


def test_a_wrong_flag_is_told_in_a_sentence():
    for flags, told in (
        (["--dataset", "gs://b/c"], "give a folder here or s3://"),
        ([], "--dataset"),
    ):
        done = run_job(*flags)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_a_dataset_that_is_whole_ends_with_0_and_one_that_is_not_with_1(place, tmp_path):
    queue, uri = f"{place}/queue", f"{place}/candidates"
    write(queue, "queue", TRIPLETS, "abc")
    write(uri, "candidates", CANDIDATES, "cab")
    ledger = tmp_path / "ledger"
    ledger.write_text('{"key": "a"}\n{"key": "b"}\n{"key": "a"}\n')
    done = run_job("--dataset", uri, "--ledger", ledger)
    assert done.stdout.splitlines() == [
        f"wanted = 3 keys of {queue}",
        "lost = 0",
        "duplicate = 0",
        "unexpected = 0",
        "recomputed = 1",
    ]
    assert (done.returncode, done.stderr) == (0, "")
    write(uri, "candidates", CANDIDATES, "abbd")
    done = run_job("--dataset", uri, "--source", queue)
    assert done.stdout.splitlines()[1:] == ["lost = 1", "duplicate = 1", "unexpected = 1"]
    assert done.returncode == 1
    assert "1 keys are lost and 1 rows are there twice, such as c" in done.stderr
    assert run_job("--dataset", f"{place}/nothing").returncode == 1
