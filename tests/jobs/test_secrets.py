"""Keys that are in the environment of jobs: they are used, and found again nowhere."""

import os
import subprocess
import sys

import pytest

from ip2p_ray import storage
from ip2p_ray.schema import TRIPLETS
from ip2p_ray.stages.captions import collect_captions
from ip2p_ray.testing import Behaviour, FaultyServer
from tests.jobs.running import ROOT, Job

KEYS = {
    "OPENAI_API_KEY": "sk-planted-openai-0123456789",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-0123456789",
    "AWS_SESSION_TOKEN": "planted-aws-session-0123456789",
    "IP2P_API_KEYS": "planted-service-key-0123456789",
    "IP2P_API_KEY": "planted-client-key-0123456789",
    "HF_TOKEN": "hf_planted0123456789",
    "RAY_AUTH_TOKEN": "planted-ray-token-0123456789-0123456789",
}


def found_in(told, folder=None):
    """Where a planted key stands: names of files, or "told"."""
    places = {"told": told.encode()}
    if folder is not None:
        for path in folder.rglob("*"):
            if path.is_file():
                places[str(path)] = path.read_bytes()
    return [
        (name, place)
        for place, content in places.items()
        for name, key in KEYS.items()
        if key.encode() in content
    ]


def test_a_planted_key_would_be_found(tmp_path):
    (tmp_path / "a").write_bytes(b"x" + KEYS["HF_TOKEN"].encode())
    assert found_in(KEYS["OPENAI_API_KEY"], tmp_path) == [
        ("OPENAI_API_KEY", "told"),
        ("HF_TOKEN", str(tmp_path / "a")),
    ]


@pytest.mark.ray
def test_jobs_write_and_say_no_key(tmp_path):
    """What is asked of a server with the key, what is made of it, and what goes wrong."""
    captions, out = str(tmp_path / "captions"), tmp_path / "out"
    collect_captions([f"a red boat {number}" for number in range(6)], captions, config={})
    write = Job("write_triplets.py", "--captions", captions, "--model", "fake", "--shots", "0")
    with FaultyServer(Behaviour(api_key=KEYS["OPENAI_API_KEY"])) as server:
        done = write.run("--base-url", server.url, "--out", out, **KEYS)
        assert done.returncode == 0, done.stderr
        assert storage.read_dataset(str(out / "triplets"), TRIPLETS).num_rows
        said = done.stdout + done.stderr
        wrong = {**KEYS, "OPENAI_API_KEY": KEYS["IP2P_API_KEY"]}
        refused = write.run("--base-url", server.url, "--out", tmp_path / "refused", **wrong)
        assert refused.returncode == 1
        said += refused.stdout + refused.stderr
    # a cluster that does not exist, and a bucket that nobody answers for
    bucket = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    lost = Job("collect_captions.py").run("--files", "s3://bucket/a.csv", **KEYS, **bucket)
    assert lost.returncode == 1
    checked = Job("preflight.py").run("--storage", "s3://bucket/a", **KEYS, **bucket)
    assert checked.returncode == 1
    said += lost.stdout + lost.stderr + checked.stdout + checked.stderr
    assert found_in(said, tmp_path) == []


SHOWN = """
import os, pickle
from ip2p_ray import object_files, objects, presets, s3
from ip2p_ray.errors import Ip2pError
from ip2p_ray.remote_editor import RemoteEditor
from ip2p_ray.triplets.endpoint import Connection, Endpoint
from ip2p_ray.triplets.writer import OpenAIWriter, WriterConfig
from jobs.preflight import Preflight
from serve.app import ServiceConfig
from serve.keys import Keys

travels = [WriterConfig(model="fake"), Endpoint(), ServiceConfig(), presets.by_name("miniature")]
travels += [Preflight(), object_files.ObjectFolder("s3://bucket/a"), object_files.ObjectFile("s3://bucket/a")]
for each in travels:
    print(repr(each), str(each), vars(each), pickle.dumps(each))
stays = [Connection(Endpoint()), OpenAIWriter(WriterConfig(model="fake")), Keys.from_environment()]
stays += [RemoteEditor("http://127.0.0.1:9", os.environ["IP2P_API_KEY"]), s3.client()]
for each in stays:
    print(repr(each), str(each))
for call in (objects.check, objects.read, object_files.opened):
    try:
        call("s3://bucket/a")
    except Ip2pError as error:
        print(repr(error), str(error), pickle.dumps(error))
    else:
        raise AssertionError("somebody answers")
"""
"""What is sent to other processes, and what is only shown, and what is raised."""


def test_nothing_that_travels_or_is_shown_holds_a_key():
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SHOWN],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **KEYS, **nobody, "AWS_ACCESS_KEY_ID": "x"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 15
    assert found_in(done.stdout + done.stderr) == []
