import json
import re

import pytest

from tests.jobs.running import Job

run_job = Job("benchmark.py", "pipeline").run

FLAGS = {"--triplets", "--seconds", "--real", "--many", "--json"}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


def test_bad_flags_end_in_status_2_and_a_sentence(tmp_path):
    for arguments, told in (
        (["--triplets", "0"], "--triplets is at least 1"),
        (["--seconds", "0"], "--seconds above 0"),
        (["--json", tmp_path], "is a folder"),
    ):
        done = run_job(*arguments)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_what_ray_costs_is_measured(tmp_path):
    told = tmp_path / "figures.json"
    asked = ["--triplets", 4, "--seconds", 0.2, "--real", 2, "--many", 40]
    done = run_job(*asked, "--json", told)
    assert done.returncode == 0, done.stderr
    found = json.loads(told.read_text())
    assert found["date"]
    assert found["versions"]["ray"]
    assert [run["workers"] for run in found["sleeping"]] == [1, 2, 4]
    assert [run["triplets"] for run in found["sleeping"]] == [4, 8, 16]
    assert all(0 < run["efficiency"] < 1.01 for run in found["sleeping"])
    assert all(0 < run["busy"] < 1.01 for run in found["sleeping"])
    assert found["real"]["stage_0"]["triplets"] == found["real"]["bare_0"]["triplets"] == 2
    seconds = {
        kind: found["real"][f"{kind}_0"]["seconds"] + found["real"][f"{kind}_1"]["seconds"]
        for kind in ("stage", "bare")
    }
    assert found["real"]["overhead"] == pytest.approx(seconds["stage"] / seconds["bare"] - 1)
    assert [run["triplets"] for run in found["many"]["runs"]] == [4, 40]
    assert all(run["driver"] > 1e8 for run in found["many"]["runs"])
    assert "pipeline: 40 triplets that cost nothing" in done.stdout
