import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
JOB = ROOT / "jobs" / "collect_captions.py"

FLAGS = {
    "--files",
    "--out",
    "--column",
    "--url-column",
    "--source-column",
    "--sample",
    "--seed",
    "--language",
    "--held-out",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def run_job(*arguments):
    return subprocess.run(
        [sys.executable, str(JOB), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "400"},  # no sentence is broken by the frame around it
    )


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


def test_bad_flags_end_in_status_2_and_a_sentence(tmp_path):
    fine = tmp_path / "a.txt"
    fine.write_text("a cat\n")
    for arguments, told in (
        ([], "--files"),
        (["--files"], "--files"),
        (["--files", tmp_path / "none.csv"], "none.csv: there is no such file or folder"),
        (["--files", "s3://bucket/a.csv"], "only local files can be read"),
        (["--files", fine, "--sample", "0"], "--sample is at least 1"),
        (["--files", fine, "--language", "de"], "--language"),
        (["--files", fine, "--held-out", "1"], "--held-out lies in"),
    ):
        done = run_job(*arguments)
        assert done.returncode == 2, arguments
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_captions_are_collected_once_and_a_wrong_column_is_told(tmp_path):
    given, out = tmp_path / "a.csv", tmp_path / "out"
    given.write_text("Alt,URL\na cat,u1\na dog,u2\n,u3\n")
    done = run_job("--files", given, "--out", out)
    assert done.returncode == 1
    assert done.stderr.startswith(f"collect_captions: {given} has none of the columns caption, ")
    assert "it has: Alt, URL" in done.stderr
    assert done.stderr.count("\n") == 1
    done = run_job("--files", given, "--column", "Alt", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "captions: kept 2 of 3 (67 %); rejected empty_caption 1" in done.stdout
    assert done.stdout.endswith(f"collect_captions: {out / 'captions'} has 2 rows\n")
    again = run_job("--files", given, "--column", "Alt", "--out", out)
    assert "captions: there already, 2 rows" in again.stdout
