import json
import re

import pytest

from ip2p_ray.miniature.weights import load_editor
from tests.jobs.running import Job

run_job = Job("benchmark.py", "editor").run

FLAGS = {
    "--model",
    "--sd15",
    "--device",
    "--dtype",
    "--resolution",
    "--steps",
    "--batch-size",
    "--batch-waits-s",
    "--threads",
    "--rates",
    "--compare-at",
    "--requests",
    "--saturation",
    "--rounds",
    "--sequential",
    "--seed",
    "--json",
    "--plot",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z0-9-]+", done.stdout)) - {"--help"} == FLAGS


def test_bad_flags_end_in_status_2_and_a_sentence(tmp_path):
    for arguments, told in (
        (["--dtype", "float16"], "--dtype float16 is for CUDA"),
        (["--requests", "0"], "--requests is at least 1, got 0"),
        (["--rates", "0.5", "0", "1.2"], "--rates are numbers above 0"),
        (["--rates", "0.5", "1.0"], "--compare-at is one of --rates [0.5, 1.0], got 1.2"),
        (["--batch-waits-s", "0.1", "-1"], "--batch-waits-s are not negative, got -1"),
        (["--model", "x", "--sd15"], "--model and --sd15 are two models"),
        (["--plot", tmp_path], "is a folder"),
    ):
        done = run_job(*arguments)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_a_device_that_is_not_there_ends_in_status_1_and_a_sentence():
    done = run_job("--device", "nowhere")
    assert done.returncode == 1
    assert done.stderr == "benchmark: --device 'nowhere' is not one that torch knows\n"


@pytest.mark.ray
@pytest.mark.slow
def test_the_table_is_printed_and_the_files_written(tiny_weights, tmp_path):
    load_editor(tiny_weights).save(tmp_path / "editor")
    small = ["--requests", "4", "--saturation", "4", "--rounds", "1", "--sequential", "2"]
    rates = ["--rates", "1.2", "--threads", "1", "--batch-size", "2", "--batch-waits-s", "0.1"]
    files = ["--json", tmp_path / "editor.json", "--plot", tmp_path / "editor.html"]
    done = run_job("--model", tmp_path / "editor", *small, *rates, *files)
    assert done.returncode == 0, done.stderr
    assert "pictures/s at saturation" in done.stdout
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "editor.json").read_text())
    promised = {"images_per_s", "p50_s", "p95_s", "p99_s", "loads", "batch_rows", "threads"}
    for name in ("ours", "reference", "request_batching"):
        assert promised <= set(result[name])
        assert [load["answered"] for load in result[name]["loads"]] == [4, 4]
        assert all(load["p95_s"] > 0 for load in result[name]["loads"])
    ours, reference = result["ours"], result["reference"]
    assert result["ratio"]["p95_s"] == pytest.approx(ours["p95_s"] / reference["p95_s"])
    assert result["ratio"]["images_per_s"] == pytest.approx(
        ours["images_per_s"] / reference["images_per_s"]
    )
    assert set(result["ratio_to_request_batching"]) == set(result["ratio"])
    # one by one means one by one, and the others are never fuller than they may be
    assert reference["batch_rows"] == 1
    assert all(1 <= result[name]["batch_rows"] <= 2 for name in ("ours", "request_batching"))
    assert result["overhead"]["requests"] == 2
    assert result["cold_start"]["process_to_first_picture_s"] > 0
    assert (tmp_path / "editor.html").read_text().count("<svg") == 4
