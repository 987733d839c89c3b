import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
JOB = ROOT / "jobs" / "benchmark.py"

FLAGS = {
    "--captions",
    "--delay",
    "--fault-rate",
    "--actors",
    "--concurrency",
    "--shots",
    "--json",
}
"""Of `triplets`. Public: a flag that goes away, or changes its name, breaks somebody's command."""


def run_job(*arguments):
    return subprocess.run(
        [sys.executable, str(JOB), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "400", "OMP_NUM_THREADS": "1"},
    )


def test_the_flags_are_those_that_were_promised():
    done = run_job("triplets", "--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


def test_bad_flags_end_in_status_2_and_a_sentence():
    for arguments, told in (
        ([], "triplets"),
        (["triplets", "--captions", "0"], "--captions is at least 1"),
        (["triplets", "--fault-rate", "1"], "--fault-rate lies in [0, 1)"),
        (["triplets", "--replies", "1"], "--replies"),
        (["triplets", "--json", ROOT], "is a folder; give a file"),
    ):
        done = run_job(*arguments)
        assert done.returncode == 2, arguments
        assert told in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_the_stage_of_triplets_is_measured(tmp_path):
    told = tmp_path / "figures.json"
    asked = ["--captions", 300, "--delay", 0.1, "--actors", 2, "--concurrency", 8]
    done = run_job("triplets", *asked, "--json", told)
    assert done.returncode == 0, done.stderr
    found = json.loads(told.read_text())
    assert found["replies"] == 300
    assert found["most_in_flight"] <= 16
    rates = found["replies_a_second"]
    assert rates["ideal"] == 160
    assert 0 < rates["whole"] < rates["steady"] < 1.2 * rates["ideal"]
    roles = {"driver", "actors", "server", "other workers", "Ray itself"}
    assert found["cpu_seconds"].keys() == found["peak_rss_mib"].keys() == roles
    assert found["cpu_seconds"]["actors"] > found["cpu_seconds"]["server"] > 0
    assert all(50 < found["peak_rss_mib"][role] < 2000 for role in roles)
    assert re.search(r"replies a second: [\d.]+ of 160.0 ideal", done.stdout)
