import re

import pytest

from tests.jobs.running import Job

run_job = Job("measure_findings.py").run

FLAGS = {
    "--out",
    "--captions",
    "--candidates",
    "--steps",
    "--seeds",
    "--tasks",
    "--grid-tasks",
    "--workers",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--steps", "0"], "--steps is at least 1"),
        (["--seeds"], "--seeds needs a number"),
        (["--captoins", "3"], "--captoins"),
    ],
)
def test_a_wrong_flag_is_told_in_a_sentence(flags, told):
    done = run_job(*flags)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
