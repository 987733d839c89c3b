import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs.running import shards_below

ROOT = Path(__file__).resolve().parent.parent.parent
JOB = ROOT / "jobs" / "quickstart.py"

FLAGS = {
    "--out",
    "--seed",
    "--captions",
    "--candidates",
    "--train-steps",
    "--workers",
    "--smoke",
    "--weights",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def run_job(*arguments, timeout=800):
    return subprocess.run(
        [sys.executable, str(JOB), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "400"},  # no sentence is broken by the frame around it
    )


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


def test_help_and_bad_flags_need_no_heavy_library():
    """What is imported before the command line is parsed."""
    code = (
        "import runpy, sys; sys.argv = ['quickstart.py', '--help']\n"
        f"try: runpy.run_path({str(JOB)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'ray', 'torch', 'diffusers', 'transformers', 'open_clip', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=800)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--captoins", "3"], "--captoins"),
        (["--captions", "many"], "--captions"),
        (["--captions", "0"], "--captions is at least 1"),
        (["--train-steps", "-3"], "--train-steps is at least 1"),
        (["--seed", "-1"], "--seed lies in"),
        (["--workers"], "--workers"),
        (["surplus"], "surplus"),
    ],
)
def test_a_bad_flag_ends_in_status_2_and_a_sentence(arguments, told):
    done = run_job(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_an_out_that_is_a_file_ends_in_status_2_and_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for out, told in ((tmp_path / "file", "is a file"), (tmp_path / "file/x", "cannot be made")):
        done = run_job("--out", out)
        assert done.returncode == 2
        assert f"--out {out} {told}" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_smoke_run_has_a_folder_of_its_own():
    """It makes other data, which a full run in the same folder would have to refuse."""
    quickstart = runpy.run_path(str(JOB))["Quickstart"]
    assert quickstart().folder == "runs/quickstart"
    assert quickstart(smoke=True).folder == "runs/smoke"
    assert quickstart(smoke=True, out="s3://bucket/here").folder == "s3://bucket/here"
    told = " ".join(run_job("--help").stdout.split())
    assert "by default runs/quickstart, with --smoke runs/smoke" in told


@pytest.mark.ray
def test_ctrl_c_while_the_libraries_load_ends_in_status_130_and_a_sentence(tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, str(JOB), "--out", str(tmp_path / "out")]
    job = subprocess.Popen(command, text=True, cwd=ROOT, **pipes)
    try:
        assert job.stdout.readline().endswith("loading the libraries\n")
        job.send_signal(signal.SIGINT)
        _, told = job.communicate(timeout=600)
    finally:
        job.kill()
        job.communicate()
    assert job.returncode == 130
    assert told == "quickstart: stopped before it began\n"


@pytest.mark.ray
def test_a_missing_weights_folder_is_named_in_one_sentence(tmp_path):
    done = run_job("--weights", tmp_path / "none", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr == (
        f"quickstart: the miniature's weights folder {tmp_path / 'none'} does not exist\n"
    )


@pytest.mark.ray
@pytest.mark.parametrize(
    "part",
    [
        "generator/unet/diffusion_pytorch_model.safetensors",
        "writer/model.safetensors",
        "judge/open_clip_model.safetensors",
        "editor/unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_broken_weights_are_named_in_one_sentence(tiny_weights, tmp_path, part):
    folder = tmp_path / "weights"
    shutil.copytree(tiny_weights, folder)
    whole = (folder / part).read_bytes()
    (folder / part).write_bytes(whole[: len(whole) // 2])
    done = run_job("--weights", folder, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert str(folder) in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def slow_weights(tiny_weights, tmp_path):
    """Weights whose candidates take a while, so that a run can be stopped among them."""
    folder = tmp_path / "weights"
    shutil.copytree(tiny_weights, folder)
    pairs = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    (folder / "pairs.json").write_text(json.dumps({**pairs, "steps": 100, "keep": 8}))
    return folder


def start_until(command, reached, limit_s=600):
    """The running job, once `reached()` holds; else it is ended."""
    job = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        process_group=0,  # as in a terminal, where Ctrl-C reaches all of the group
    )
    deadline = time.monotonic() + limit_s
    while not reached():
        if job.poll() is not None or time.monotonic() > deadline:
            job.kill()
            pytest.fail(f"it ended, or took too long: {job.communicate()}")
        time.sleep(0.05)
    return job


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_stopped_and_killed_ends_as_an_undisturbed_one(slow_weights, tmp_path):
    from ip2p_ray import storage
    from ip2p_ray.schema import CANDIDATES, LATENTS, PAIRS, TRIPLETS, pair_key

    out = tmp_path / "out"
    arguments = ["--out", out, "--weights", slow_weights, "--captions", 8, "--candidates", 8]
    arguments += ["--train-steps", 80]
    command = [sys.executable, str(JOB), *map(str, arguments)]

    def candidates():
        return len(shards_below(out / "candidates"))

    job = start_until(command, lambda: candidates() >= 1)
    os.killpg(job.pid, signal.SIGINT)
    _, told = job.communicate(timeout=600)
    assert job.returncode == 130
    assert "the same command goes on" in told
    assert not (out / "candidates" / "_manifest.json").exists()

    before = candidates()
    job = start_until(command, lambda: candidates() >= before + 1)
    job.kill()
    job.communicate(timeout=600)
    job = start_until(command, lambda: any((out / "checkpoints").glob("step-*")))
    job.kill()
    job.communicate(timeout=600)
    assert not (out / "checkpoints" / "_manifest.json").exists()

    done = run_job(*command[2:])
    assert done.returncode == 0, done.stderr
    triplets = storage.read_dataset(str(out / "triplets"), TRIPLETS).to_pylist()
    rows = storage.read_dataset(str(out / "candidates"), CANDIDATES).to_pylist()
    assert sorted(row["triplet_key"] for row in rows) == sorted(
        row["triplet_key"] for row in triplets
    )
    expected = sorted(
        pair_key(row["triplet_key"], index, row["recipe"]) for row in rows for index in range(8)
    )
    pairs = storage.read_dataset(str(out / "pairs"), PAIRS).to_pylist()
    assert sorted(row["pair_key"] for row in pairs) == expected
    latents = storage.read_dataset(str(out / "latents"), LATENTS).to_pylist()
    train = sorted(row["pair_key"] for row in pairs if row["split"] == "train")
    assert sorted(row["pair_key"] for row in latents) == train
    assert (out / "report.html").stat().st_size > 0
    assert [path for path in out.rglob("*") if path.name.endswith((".partial", ".tmp"))] == []
    assert list((out / ".resume").iterdir()) == []

    again = run_job(*command[2:])
    assert again.returncode == 0
    assert "candidates: there already" in again.stdout
    assert "python jobs/edit.py --image" in again.stdout.splitlines()[-1]
