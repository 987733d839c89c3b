import itertools
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import ViTConfig, ViTModel

from ip2p_ray import storage
from ip2p_ray.clip import Clip
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.miniature import scores
from ip2p_ray.miniature.scenes import draw
from ip2p_ray.presets import folder_fingerprint
from jobs.evaluate_editor import EvaluateEditor, _settings
from tests.jobs.running import ROOT, Job, shards_below

JOB = Job("evaluate_editor.py")
command, run_job = JOB.command, JOB.run

FLAGS = {
    *("--editor", "--compare", "--data", "--turns", "--out", "--preset", "--tasks"),
    *("--curve-tasks", "--text-guidance-scale", "--image-guidance-scale"),
    *("--text-guidance-scales", "--image-guidance-scales", "--strengths", "--self-replaces"),
    *(
        "--steps",
        "--generator",
        "--generator-guidance-scale",
        "--judge",
        "--dino",
        "--resolution",
        "--seed",
        "--resamples",
    ),
    *("--shown", "--dtype", "--actors", "--gpus", "--cpus", "--batch-size"),
    *("--tasks-at-a-time", "--actor-resources"),
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tasks", "0"], "--tasks is at least 1"),
        (["--strengths", "0"], "--strengths lie in (0, 1]"),
        (["--self-replaces", "1.5"], "--self-replaces lie in [0, 1]"),
        (["--text-guidance-scale", "nan"], "guidance scales are finite"),
        (["--preset", "paper"], "--preset paper needs an --editor"),
        (["--preset", "paper", "--editor", "x"], "--preset paper needs --data"),
        (["--turns", "multi"], "--turns multi needs --data"),
        (["--resamples", "3"], "--resamples is at least 100"),
        (["--generator-guidance-scale", "inf"], "--generator-guidance-scale is a finite"),
        (["--generator-guidance-scale", "-1"], "--generator-guidance-scale is a finite"),
        (["--task", "3"], "--task"),
    ],
)
def test_a_wrong_flag_is_told_in_a_sentence(flags, told):
    done = run_job(*flags)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def settings(**flags):
    """The contest that the flags mean."""
    return _settings(EvaluateEditor(**flags))[1]


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_the_papers_models_are_asked_at_the_papers_scales(preset):
    given = {"preset": preset, "editor": "someone/editor", "data": "/some/set"}
    contest = settings(**given)
    assert contest.trials.text_guidance_scales == (7.5,)
    assert contest.trials.text_guidance_scale is None
    assert contest.guidance_scale == 7.5
    stated = settings(**given, text_guidance_scales=(5.0,), generator_guidance_scale=3.0)
    assert stated.trials.text_guidance_scales == (5.0,)
    assert stated.guidance_scale == 3.0


def test_the_miniature_is_asked_at_its_own():
    contest = settings()
    assert contest.trials.text_guidance_scales == ()
    assert contest.guidance_scale is None


@pytest.fixture(scope="module")
def flags(tiny_weights):
    """Of a run on models that are random, small and quick."""
    return [
        *("--editor", tiny_weights, "--generator", tiny_weights / "generator"),
        *("--judge", tiny_weights / "judge", "--steps", 2, "--resolution", 64),
        *("--image-guidance-scales", 1.0, "--strengths", 0.5, "--self-replaces", 0.5),
        *("--actors", 1, "--tasks-at-a-time", 1, "--resamples", 100, "--shown", 3),
    ]


@pytest.fixture(scope="module")
def magic_brush(tmp_path_factory):
    """Two sessions of drawn pictures, of two turns and of one, in MagicBrush's layout."""
    root = tmp_path_factory.mktemp("MagicBrush")
    sessions, captions = {}, {}
    for session, task in zip(("1", "2"), scores.edit_tasks(2, 0), strict=True):
        folder = root / "images" / session
        folder.mkdir(parents=True)
        turns = [task.scene, task.edit.edited, task.scene][: 3 - int(session == "2")]
        names = [f"{session}-input.png", f"{session}-output1.png", f"{session}-output2.png"]
        for name, scene in zip(names, turns, strict=False):
            (folder / name).write_bytes(encode_png(to_pil(draw(scene))))
        sessions[session] = [
            {"input": before, "output": after, "instruction": task.instruction}
            for before, after in itertools.pairwise(names[: len(turns)])
        ]
        told = [task.caption, task.edited_caption, task.caption]
        captions[session] = dict(zip(names, told, strict=True))
    (root / "edit_sessions.json").write_text(json.dumps(sessions))
    (root / "global_descriptions.json").write_text(json.dumps(captions))
    return root


@pytest.mark.ray
def test_a_wrong_editor_is_told_in_a_sentence_before_anything_is_made(flags, tmp_path):
    done = run_job(*flags, "--tasks", 1, "--compare", "/no/such/editor", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "no model folder /no/such/editor" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "tasks").exists()


@pytest.mark.ray
def test_ground_truth_with_turns_and_dino(flags, magic_brush, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            patch_size=56,
            intermediate_size=32,
            image_size=224,
        )
        ViTModel(config).save_pretrained(tmp_path / "dino")
    asked = ["--data", magic_brush, "--turns", "multi", "--out", tmp_path / "out", *flags]
    done = run_job(*asked, "--dino", tmp_path / "dino")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert metrics["skipped"] == []
    assert metrics["tasks"]["used"] == 2
    found = metrics["table"][Path(flags[1]).name]
    for name in ("truth_l1", "truth_l2", "truth_clip", "truth_dino", "edited_caption_similarity"):
        assert found[name]["count"] == 2
    assert "correct" not in found
    assert metrics["table"]["truth"]["truth_dino"]["mean"] == pytest.approx(1.0, abs=1e-5)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    sessions = json.loads((magic_brush / "edit_sessions.json").read_text())
    assert all(turn["instruction"] in page for turns in sessions.values() for turn in turns)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(flags, tmp_path):
    asked = ["--tasks", 6, *flags]
    whole = run_job(*asked, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command(*asked, "--out", out), cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 600
        while job.poll() is None and time.monotonic() < deadline:
            if len(shards_below(out / "answers")) >= 3:
                break
            time.sleep(0.05)
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert not (out / "metrics.json").exists()
    again = run_job(*asked, "--out", out)
    assert again.returncode == 0, again.stderr
    left, right = (
        pq.read_table(folder / "scores.parquet").to_pylist() for folder in (tmp_path / "whole", out)
    )
    assert [(row["answerer"], row["task_key"]) for row in left] == [
        (row["answerer"], row["task_key"]) for row in right
    ]
    for one, other in zip(left, right, strict=True):
        assert one["image_similarity"] == pytest.approx(other["image_similarity"], abs=0.02)
    third = run_job(*asked, "--out", out)
    assert "there already" in third.stdout


@pytest.mark.parametrize("flag", ["--out", "--editor", "--data", "--judge", "--generator"])
def test_a_bucket_that_is_not_there_is_told_before_a_model_is_loaded(bucket, tmp_path, flag):
    flags = {"--out": tmp_path, flag: "s3://test-none/it"}
    done = run_job(*[word for pair in flags.items() for word in pair])
    assert done.returncode == 1
    assert "there is no bucket test-none at http://" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_everything_may_lie_in_a_bucket(flags, tiny_weights, magic_brush, bucket, tmp_path):
    storage.upload(tiny_weights, f"{bucket}/models/tiny")
    storage.upload(magic_brush, f"{bucket}/MagicBrush")
    models = {
        "--editor": f"{bucket}/models/tiny",
        "--generator": f"{bucket}/models/tiny/generator",
        "--judge": f"{bucket}/models/tiny/judge",
    }
    asked = [models.get(before, word) for before, word in itertools.pairwise(["", *flags])]
    asked += ["--data", f"{bucket}/MagicBrush", "--out", f"{bucket}/evaluation"]
    done = run_job(*asked, IP2P_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert f"see {bucket}/evaluation/report.html" in done.stdout
    metrics = json.loads(storage.read_bytes(f"{bucket}/evaluation/metrics.json"))
    assert metrics["models"]["judge"] == Clip.load(tiny_weights / "judge").fingerprint()
    assert metrics["models"]["baselines"] == folder_fingerprint(tiny_weights / "generator")
    assert metrics["tasks"]["used"] == 3
    assert b"data:image/" in storage.read_bytes(f"{bucket}/evaluation/report.html")
    assert storage.count_rows(f"{bucket}/evaluation/scores.parquet") > 3
    again = run_job(*asked, IP2P_CACHE=str(tmp_path / "cache"))
    assert again.returncode == 0, again.stderr
    assert "there already" in again.stdout
