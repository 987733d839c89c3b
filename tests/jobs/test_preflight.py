import re

from tests.jobs.running import Job

run_job = Job("preflight.py").run

FLAGS = {
    "--working-dir",
    "--storage",
    "--address",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} - {"--job"} == FLAGS


def test_wrong_flags_end_in_status_2_and_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for flags, told in (
        (["--address", "localhost"], "--address localhost: give that of the dashboard"),
        (["--storage", "https://host/a"], "--storage https://host/a: give a folder here or s3://"),
        (["--storage", tmp_path / "file"], "is a file; give a folder"),
    ):
        done = run_job(*flags)
        assert done.returncode == 2, done.stdout
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_a_line_for_everything_that_was_looked_at(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("")
    asked = ["--working-dir", tmp_path / "code", "--storage", tmp_path / "new", tmp_path]
    done = run_job(*asked)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == f"fine: 0.0 MiB in 1 files travel from {tmp_path / 'code'}"
    assert f"fine: {tmp_path / 'new'} can be listed and written to" in rest
    assert not (tmp_path / "new").exists()
    done = run_job(*asked, "--address", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "wrong: http://127.0.0.1:1 does not answer" in done.stdout
