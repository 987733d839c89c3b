import json
import re

from tests.jobs.running import Job

run_job = Job("benchmark.py").run

FLAGS = {
    "--preset",
    "--sd15",
    "--device",
    "--dtype",
    "--resolution",
    "--steps",
    "--candidates",
    "--batch-size",
    "--decode-batch",
    "--compile",
    "--channels-last",
    "--rounds",
    "--json",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def test_the_flags_are_those_that_were_promised():
    done = run_job("pairs", "--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z0-9-]+", done.stdout)) - {"--help"} == FLAGS


def test_bad_flags_end_in_status_2_and_a_sentence(tmp_path):
    for arguments, told in (
        (["pairs", "--preset", "huge"], "--preset"),
        (["pairs", "--steps", "0"], "--steps is at least 1"),
        (["pairs", "--compile"], "--compile needs a --batch-size"),
        (["pairs", "--json", tmp_path], "is a folder"),
        (["pears"], "pears"),
        ([], "pairs"),
    ):
        done = run_job(*arguments)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_a_device_that_is_not_there_ends_in_status_1_and_a_sentence():
    done = run_job("pairs", "--device", "nowhere")
    assert done.returncode == 1
    assert done.stderr == "benchmark: --device 'nowhere' is not one that torch knows\n"


def test_the_table_is_printed_and_the_json_written(tmp_path):
    out = tmp_path / "pairs.json"
    small = ["--candidates", "2", "--batch-size", "2", "--steps", "2", "--rounds", "1"]
    done = run_job("pairs", *small, "--json", out)
    assert done.returncode == 0, done.stderr
    assert "candidates/s" in done.stdout
    assert "Traceback" not in done.stderr
    result = json.loads(out.read_text())
    promised = {"candidates_per_s", "peak_bytes", "device_s_per_accepted_pair"}
    for name in ("ours", "reference", "ratio"):
        assert promised <= set(result[name])
    assert result["device"] == "cpu"
    assert result["batch_size"] == 2
