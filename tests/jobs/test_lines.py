"""What each job's docstring promises: a line that can be typed, and flags that stay."""

import ast
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.running import ROOT

JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
PARSED = 77
MADE = {"--out", "--export", "--json", "--mirror"}
"""Flags of what is made; what the others name is looked for."""

PARSE = f"""
import ast, sys
from pathlib import Path
path = sys.argv[1]
sys.argv = sys.argv[1:]
tree = ast.parse(Path(path).read_text())
for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name == "main":
        node.body = [ast.Return(ast.Constant({PARSED}))]
__file__ = path
exec(compile(ast.fix_missing_locations(tree), path, "exec"))
"""
"""Runs a job whose `main` does nothing: it ends in PARSED once all flags are understood."""


def lines(job):
    """Each `ray job submit` of a job's docstring, as a shell splits it."""
    return submissions(
        ast.get_docstring(ast.parse((ROOT / "jobs" / f"{job}.py").read_text())) or ""
    )


def submissions(text):
    joined = re.sub(r"\\\n\s*", " ", text)
    return [
        shlex.split(line)
        for line in joined.splitlines()
        if line.strip().startswith("ray job submit")
    ]


def parses(job, arguments):
    command = [sys.executable, "-c", PARSE, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


def shared(arguments, folder):
    """The arguments with /shared in the folder, where everything is that they name."""
    arguments = [word.replace("/shared", str(folder)) for word in arguments]
    for flag, word in itertools.pairwise(arguments):
        if word.startswith(str(folder)) and flag not in MADE:
            Path(word).mkdir(parents=True, exist_ok=True)
    return arguments


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_the_line_that_submits_it_and_its_flags_are_known(job, tmp_path):
    found = lines(job)
    assert found, f"jobs/{job}.py has no ray job submit line in its docstring"
    for line in found:
        ours, entrypoint = line[: line.index("--")], line[line.index("--") + 1 :]
        assert ours[:5] == ["ray", "job", "submit", "--working-dir", "."]
        assert entrypoint[:2] == ["python", f"jobs/{job}.py"]
        done = parses(job, shared(entrypoint[2:], tmp_path))
        assert done.returncode == PARSED, done.stderr


@pytest.mark.parametrize("line", submissions((ROOT / "README.md").read_text()), ids=" ".join)
def test_what_readme_submits_is_understood(line, tmp_path):
    _, job, *arguments = line[line.index("--") + 1 :]
    done = parses(Path(job).stem, shared(arguments, tmp_path))
    assert done.returncode == PARSED, done.stderr


def test_readme_submits_every_job():
    lines = submissions((ROOT / "README.md").read_text())
    assert {Path(line[line.index("--") + 2]).stem for line in lines} == set(JOBS)


def test_a_flag_that_does_not_exist_is_noticed():
    done = parses("quickstart", ["--captoins", "3"])
    assert done.returncode == 2
    assert "--captoins" in done.stderr


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_a_test_that_holds_its_flags(job):
    tests = (ROOT / "tests" / "jobs").glob(f"test_{job}*.py")
    assert any("\nFLAGS = " in path.read_text() for path in tests)
