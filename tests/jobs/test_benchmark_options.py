import json
import re

from tests.jobs.running import Job

run_job = Job("benchmark.py").run

OPTIONS_FLAGS = {
    "--preset",
    "--triplets",
    "--prompts",
    "--pilots",
    "--candidates",
    "--stop-early",
    "--stop-margin",
    "--give-up",
    "--lose",
    "--batch-size",
    "--device",
    "--json",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def test_the_flags_are_those_that_were_promised():
    done = run_job("options", "--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == OPTIONS_FLAGS


def test_bad_flags_end_in_status_2_and_a_sentence(tmp_path):
    for arguments, told in (
        ([], "options"),
        (["options", "--prompts", "0"], "--prompts is at least 1"),
        (["options", "--lose", "1.5"], "--lose lies between 0 and 1"),
        (["options", "--triplets", tmp_path / "none"], "is no file"),
        (["options", "--json", tmp_path], "is a folder"),
        (["options", "--batch-size", "2"], "--batch-size is at least 3"),
    ):
        done = run_job(*arguments)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_a_preset_that_is_none_ends_in_status_1_and_a_sentence():
    done = run_job("options", "--preset", "poster")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "benchmark: preset is one of paper, fast, miniature, got 'poster'"
    )


def test_the_options_of_the_miniature_are_measured(tmp_path):
    file = tmp_path / "options.json"
    sizes = ["--prompts", 1, "--pilots", 3, "--candidates", 4]
    done = run_job("options", *sizes, "--json", file)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    ways = content["options"]
    assert ways["full"]["candidates"] == 4
    assert ways["share_source=4"]["unet_rows"] * 8 == ways["full"]["unet_rows"] * 5
    for name in ways:
        assert f"\n{name} " in done.stdout
    assert content["preset"] == "miniature"
