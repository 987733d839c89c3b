import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ip2p_ray import objects, storage
from ip2p_ray.copies import local_folder
from ip2p_ray.miniature import writer as miniature_writer
from ip2p_ray.miniature.scores import random_captions
from ip2p_ray.miniature.tiny import true_edit
from ip2p_ray.miniature.weights import WEIGHTS
from ip2p_ray.presets import folder_fingerprint
from ip2p_ray.schema import split_of
from ip2p_ray.stages.run import locked
from ip2p_ray.triplets.local_writer import LocalWriter
from ip2p_ray.triplets.reply import Triplet

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
    "--worker-resources",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def run_job(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    return subprocess.run(
        [sys.executable, str(JOB), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1700,
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
        ([*server, "--base-url", "http://h:99999/v1"], 2, "--base-url is like"),
        ([*server[:4], "--out", "s3://bucket/w"], 2, "--out s3://bucket/w: of --backend openai a"),
        (
            ["--backend", "local", "--out", "gs://b/w"],
            2,
            "--out gs://b/w: give a folder here or s3",
        ),
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


def scores(done):
    """Valid edits in percent, before and after."""
    assert done.returncode == 0, done.stderr
    found = re.findall(r"\d+ replies, \d+ % parse, (\d+) % are valid", done.stdout)
    before, after = map(int, found)
    return before, after


@pytest.fixture
def untrained(tmp_path):
    """A writer that knows nothing, so that whatever it can do afterwards it has learned."""
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "writer", local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = miniature_writer.build(len(tokenizer), tokenizer.eos_token_id)
    model.save_pretrained(tmp_path / "untrained")
    tokenizer.save_pretrained(tmp_path / "untrained")
    return tmp_path / "untrained"


@pytest.fixture
def examples(tmp_path):
    """200 triplets of a small world, written as users would, and one that no context holds."""
    path = tmp_path / "examples.jsonl"
    rows = [Triplet(text, *true_edit(text)) for text in random_captions(200, 3)]
    long = Triplet(" ".join(["qz"] * 50), "make it blue", " ".join(["xj"] * 50))
    assert split_of(long.key, 0.1) == "train"
    rows.append(long)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return path


@pytest.mark.ray
def test_a_local_writer_learns_from_the_examples(tmp_path, untrained, examples, bucket):
    out = tmp_path / "out"
    flags = ["--backend", "local", "--out", out, "--model", untrained, "--examples", examples]
    flags += ["--learning-rate", "4e-3", "--epochs", "4"]
    done = run_job(*flags)
    before, after = scores(done)
    assert before == 0
    assert after >= 50
    assert f"the new model is {out / 'writer'}" in done.stdout
    assert "warning" not in done.stdout
    assert re.search(r"fine-tuning: 1 of \d+ examples are left out", done.stdout)
    assert LocalWriter.load(out / "writer").write(["a red boat at sea"], seed=0)[0]
    again = run_job(*flags)
    assert "writer: there already" in again.stdout, (again.returncode, again.stderr)
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]
    other = run_job(*flags[:-1], "3")
    assert other.returncode == 1
    assert "was made differently (epochs 4 there, 3 now)" in other.stderr

    storage.upload(out / "writer", f"{bucket}/writer")
    objects.write_file(f"{bucket}/examples.jsonl", examples)
    flags = ["--backend", "local", "--out", f"{bucket}/worse"]
    flags += ["--examples", f"{bucket}/examples.jsonl", "--model", f"{bucket}/writer"]
    done = run_job(*flags, "--learning-rate", "1")
    assert scores(done) == (after, 0)
    assert f"the new model is {bucket}/worse/writer" in done.stdout
    assert "finetune_writer: warning: the new model is worse than the one" in done.stdout
    assert (out / "writer" / "model.safetensors").is_file()
    worse = storage.read_manifest(f"{bucket}/worse/writer")
    assert worse.models["writer"] == folder_fingerprint(out / "writer")
    LocalWriter.load(local_folder(f"{bucket}/worse/writer", tmp_path / "cache"))
