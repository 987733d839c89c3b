"""What a job says for itself before it has loaded anything."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ip2p_ray.command import custom_resources, loading, require_place, require_uri
from ip2p_ray.errors import ConfigError


def test_ctrl_c_while_loading_ends_in_status_130_and_a_sentence():
    code = (
        "import time\nfrom ip2p_ray.command import loading\n"
        "with loading('job'):\n    print('in', flush=True)\n    time.sleep(60)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    try:
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=600)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert told == "job: stopped before it began\n"


def test_ctrl_c_is_an_exception_again_afterwards():
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with loading("job"):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with loading("job"):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


def test_places_that_can_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "new", tmp_path / "deep" / "new"):
        require_place("--out", path, folder=True)
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "deep" / "new"):
        require_place("--out", path, folder=False)


@pytest.mark.parametrize(
    ("name", "folder", "told"),
    [
        ("file", True, "is a file; give a folder"),
        ("folder", False, "is a folder; give a file"),
        ("file/below", True, "file is no folder"),
        ("file/below/deep", False, "file is no folder"),
    ],
)
def test_places_that_cannot_be_written_to_are_named(tmp_path, name, folder, told):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=rf"--out {re.escape(str(tmp_path / name))} .*{told}"):
        require_place("--out", tmp_path / name, folder=folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_places_where_this_user_may_not_write_are_named(tmp_path, mode):
    closed = tmp_path / "closed"
    closed.mkdir(mode=mode)
    for path in (closed / "new", closed / "deep" / "new"):
        with pytest.raises(ConfigError, match="closed is not writable"):
            require_place("--out", path, folder=True)


def test_uris_of_folders_and_buckets(tmp_path):
    for uri in ("runs/a", tmp_path / "a", f"file://{tmp_path}/a", "s3://bucket", "s3://bucket/a/b"):
        require_uri("--out", uri, written=True)
    (tmp_path / "file").write_text("")
    for wrong, told in {
        "gs://bucket/a": "--out gs://bucket/a: give a folder here or s3://bucket/folder",
        "https://host/a": "give a folder here",
        "s3:///a": "names no bucket",
        f"file://{tmp_path}/file": "is a file; give a folder",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(told)):
            require_uri("--out", wrong, written=True)


def test_a_submitted_job_wants_an_absolute_place(tmp_path, monkeypatch):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match=r"--out runs/q would lie in Ray's copy.*absolute path"):
        require_place("--out", Path("runs/q"), folder=True)
    with pytest.raises(ConfigError, match="--out runs/q would lie"):
        require_uri("--out", "runs/q", written=True)
    require_place("--out", tmp_path / "runs", folder=True)
    monkeypatch.chdir(tmp_path)
    require_place("--out", Path("runs/q"), folder=True)


def test_custom_resources_are_read_in_the_order_of_their_names():
    assert custom_resources("--flag", ()) == ()
    found = custom_resources("--flag", ("generator=1", "big=0.25"))
    assert found == (("big", 0.25), ("generator", 1.0))


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["generator"], "--flag generator: give NAME=AMOUNT"),
        (["generator=many"], "--flag generator=many: give NAME=AMOUNT"),
        (["=1"], "without blanks"),
        (["a =1"], "without blanks"),
        (["memory=1"], "memory is Ray's own"),
        (["a=0"], "--flag a=0: an amount is at least 0.0001"),
        (["a=nan"], "an amount is at least"),
        (["a=inf"], "an amount is at least"),
        (["a=1", "a=2"], "--flag names a more than once"),
    ],
)
def test_custom_resources_that_cannot_be_are_told(texts, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        custom_resources("--flag", texts)
