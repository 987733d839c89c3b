"""The job against `transformers serve` with the miniature's writer: another process, real HTTP."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from ip2p_ray import storage
from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.scores import random_captions
from ip2p_ray.miniature.weights import WEIGHTS
from ip2p_ray.schema import TRIPLETS
from ip2p_ray.stages.captions import collect_captions

ROOT = Path(__file__).resolve().parent.parent.parent
SERVE = Path(sys.executable).with_name("transformers")
PATIENCE_S = 180


@pytest.fixture
def base_url(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--device", "cpu", "--port", str(port)]
    with (
        (tmp_path / "serve.log").open("wb") as log,
        subprocess.Popen([SERVE, "serve", *options], stdout=log, stderr=log) as server,
    ):
        try:
            for _ in range(PATIENCE_S):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except URLError:
                    assert server.poll() is None, (tmp_path / "serve.log").read_text()
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_the_miniatures_writer_behind_a_real_server_writes_true_edits(base_url, tmp_path):
    if not SERVE.exists():
        pytest.skip("transformers' command is not installed")
    captions = random_captions(40, 0)
    collect_captions(captions, str(tmp_path / "captions"), config={})
    command = [sys.executable, "jobs/write_triplets.py", "--captions", tmp_path / "captions"]
    command += ["--out", tmp_path, "--base-url", base_url, "--api-key-env", "none"]
    command += ["--form", "completions", "--concurrency", "4", "--model", WEIGHTS / "writer"]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    rows = storage.read_dataset(str(tmp_path / "triplets"), TRIPLETS).to_pylist()
    true = [
        grammar.is_true_edit(row["caption"], row["instruction"], row["edited_caption"])
        for row in rows
    ]
    assert len(rows) >= 36
    assert sum(true) >= 0.9 * len(rows)
