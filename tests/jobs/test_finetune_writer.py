import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ip2p_ray.stages.run import locked
from ip2p_ray.triplets.local_writer import LocalWriter

ROOT = Path(__file__).resolve().parent.parent.parent
JOB = ROOT / "jobs" / "finetune_writer.py"

FLAGS = {
    "--backend",
    "--out",
    "--model",
    "--examples",
    "--held-out",
    "--epochs",
    "--seed",
    "--form",
    "--suffix",
    "--base-url",
    "--api-key-env",
    "--poll",
    "--score",
    "--no-score",
    "--batch-size",
    "--learning-rate",
    "--workers",
    "--gpus",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def run_job(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    return subprocess.run(
        [sys.executable, str(JOB), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**environment, "COLUMNS": "400", "OMP_NUM_THREADS": "1"},
    )


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"(--[a-z][a-z-]+) ", done.stdout)) - {"--help"} >= FLAGS - {"--score"}
    flags = set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"}
    assert flags == FLAGS


def test_what_is_wrong_is_told_in_a_sentence(tmp_path):
    server = ["--backend", "openai", "--model", "m", "--out", tmp_path / "out"]
    for arguments, status, told in (
        ([], 2, "--backend"),
        (["--backend", "openai"], 2, "--model names"),
        (["--backend", "local", "--model", tmp_path / "no"], 2, "no such folder"),
        ([*server, "--held-out", "1"], 2, "--held-out lies in (0, 1)"),
        (server, 1, "the environment variable OPENAI_API_KEY holds no key"),
        (
            ["--backend", "local", "--model", tmp_path, "--out", tmp_path / "out"],
            1,
            "cannot be loaded",
        ),
    ):
        done = run_job(*arguments)
        assert done.returncode == status, done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_a_folder_is_one_runs_alone(tmp_path):
    with locked(tmp_path):
        done = run_job("--backend", "local", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"finetune_writer: another run is working in {tmp_path}")


@pytest.mark.ray
def test_a_local_writer_learns_from_the_examples(tmp_path):
    flags = ["--backend", "local", "--out", tmp_path, "--learning-rate", "1e-3"]
    done = run_job(*flags)
    assert done.returncode == 0, done.stderr
    rates = [
        int(found)
        for found in re.findall(r"\d+ replies, \d+ % parse, (\d+) % are valid", done.stdout)
    ]
    assert rates[1] > rates[0] + 10
    assert f"the new model is {tmp_path / 'writer'}" in done.stdout
    assert LocalWriter.load(tmp_path / "writer").write(["a red boat at sea"], seed=0)[0]
    again = run_job(*flags)
    assert "writer: there already" in again.stdout
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]
    other = run_job(*flags, "--epochs", "2")
    assert other.returncode == 1
    assert "was made differently (epochs 1 there, 2 now)" in other.stderr
