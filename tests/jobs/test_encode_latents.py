import os
import re
import signal
import subprocess
import time

import boto3
import numpy as np
import pyarrow as pa
import pytest

from ip2p_ray import storage
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.latents import LatentDataset
from ip2p_ray.schema import PAIRS
from ip2p_ray.stages.latents import EncodingPlan
from ip2p_ray.testing import FaultyWay, WayFaults
from tests.jobs.running import ROOT, Job, refused, shards_below

JOB = Job("encode_latents.py")
command, run_job = JOB.command, JOB.run

FLAGS = {
    *("--pairs", "--out", "--preset", "--model", "--text", "--held-out", "--no-held-out"),
    *("--resolution", "--dtype", "--dry-run", "--no-dry-run", "--actors", "--most-actors"),
    *("--gpus", "--cpus", "--actor-resources", "--batch-size"),
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""

FAULTS = WayFaults(slow_down=0.03, hang_up=0.02, lost=0.02, cut=0.02)


def write_pairs(uri, count, side=64, sides=None):
    """A whole dataset of so many pairs of noise, every fifth of them held out."""
    random = np.random.default_rng(0)
    for split in ("train", "held_out"):
        rows = []
        for number in range(count):
            if (number % 5 == 4) != (split == "held_out"):
                continue
            own = (sides or [side])[number % len(sides or [side])]
            images = random.integers(0, 256, (2, own, own, 3), dtype=np.uint8)
            source, edited = ({"bytes": encode_png(to_pil(i)), "path": None} for i in images)
            rows.append(
                dict.fromkeys(PAIRS.names)
                | {
                    "pair_key": f"pair {number:04d}",
                    "triplet_key": f"triplet {number // 2:04d}",
                    "instruction": f"make it {number % 3}",
                    "split": split,
                    "source_image": source,
                    "edited_image": edited,
                }
            )
        storage.write_shard(uri, f"{split}-00000", pa.Table.from_pylist(rows, schema=PAIRS))
    storage.write_manifest(uri, storage.Manifest(dataset="pairs", recipe=f"noise {count}"))


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--out", "x"], "--pairs"),
        (["--pairs", "p", "--actors", "0"], "--actors is at least 1"),
        (["--pairs", "p", "--actors", "3", "--most-actors", "2"], "--most-actors is at least"),
        (["--pairs", "p", "--dtype", "float16"], "--dtype float16 is for GPUs"),
        (["--pairs", "p", "--text", "letters"], "--text"),
        (["--pairs", "gs://bucket/p"], "a folder here or s3://bucket/folder"),
        (["--pairs", "p", "--out", "s3:///l"], "--out s3:///l names no bucket"),
    ],
)
def test_a_wrong_flag_is_told_in_a_sentence(flags, told):
    done = run_job(*flags)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def contents(folder):
    """What is read for each pair, by split and group."""
    dataset, found = LatentDataset(folder), {}
    for split in ("train", "held_out"):
        part = dataset.of(split)
        for index in range(len(part)):
            for pick in (0.0, 0.5):
                for flip in (False, True):
                    row = part.read(index, pick=pick, flip=flip)
                    found[split, part.key(index), pick, flip] = (
                        row.instruction,
                        row.tokens,
                        row.edited_mean,
                        row.edited_std,
                        row.source_mode,
                        row.embedding,
                    )
    return found


@pytest.mark.ray
def test_sizes_are_told_and_both_splits_encoded(tiny_weights, tmp_path):
    write_pairs(str(tmp_path / "pairs"), 12)
    asked = ["--pairs", tmp_path / "pairs", "--model", tiny_weights / "generator"]
    plan = run_job(*asked, "--out", tmp_path, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    model = StableDiffusion.load(tiny_weights / "generator")
    height, width = model.latent_size(64, 64)
    told = rf"plan: 12 pairs, .* latents of {model.latent_channels} x {height} x {width}"
    assert re.search(told, plan.stdout)
    assert not (tmp_path / "latents").exists()

    done = run_job(*asked, "--out", tmp_path, "--text", "embeddings")
    assert done.returncode == 0, done.stderr
    assert f"encode_latents: {tmp_path / 'latents'} has 12 pairs" in done.stdout
    dataset = LatentDataset(tmp_path / "latents")
    assert (dataset.of("train").pairs, dataset.of("held_out").pairs) == (10, 2)
    row = dataset.read(0)
    expected = model.encode_text([row.instruction])[0].detach().numpy()
    np.testing.assert_allclose(row.embedding, expected, atol=2e-3)

    other = run_job(*asked, "--out", tmp_path)
    assert other.returncode == 1
    assert "was made differently" in other.stderr


@pytest.mark.ray
def test_pictures_of_several_sizes_need_a_resolution(tiny_weights, tmp_path):
    write_pairs(str(tmp_path / "pairs"), 6, sides=[64, 72])
    asked = ["--pairs", tmp_path / "pairs", "--model", tiny_weights / "generator"]
    done = run_job(*asked, "--out", tmp_path)
    assert done.returncode == 1
    assert "such as 64 x 64 and 72 x 72 (pair pair 0001): bring them to one" in done.stderr
    done = run_job(*asked, "--out", tmp_path, "--resolution", 64, "--no-held-out")
    assert done.returncode == 0, done.stderr
    dataset = LatentDataset(tmp_path / "latents")
    assert (dataset.pairs, dataset.of("held_out").pairs) == (5, 0)
    assert (
        len(dataset.read(0).tokens) == StableDiffusion.load(tiny_weights / "generator").text_length
    )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_kills_change_nothing(tiny_weights, tmp_path):
    """The job's process is killed at random until it is done, with other actors each time."""
    write_pairs(str(tmp_path / "pairs"), 300)
    asked = ["--pairs", tmp_path / "pairs", "--model", tiny_weights / "generator"]
    asked += ["--batch-size", 2]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_job(*asked, "--out", whole)
    assert done.returncode == 0, done.stderr
    random, kills = np.random.default_rng(1), 0
    while True:
        actors = int(random.integers(1, 3))
        job = subprocess.Popen(
            command(*asked, "--out", killed, "--actors", actors),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        resume = killed / ".resume" / "latents"
        before = len(shards_below(resume))
        fresh = int(random.integers(1, 25))
        while job.poll() is None and kills < 4:
            now = len(shards_below(resume))
            if now >= before + fresh:
                os.kill(job.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        if job.wait() == 0:
            break
    assert kills >= 2
    found, expected = contents(killed / "latents"), contents(whole / "latents")
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert row[:2] == expected[key][:2]
        # what is left after a kill is cut into other batches: float16 may round otherwise
        for ours, theirs in zip(row[2:5], expected[key][2:5], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4)
    assert LatentDataset(killed / "latents").pairs == 300


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_bucket_and_a_kill_on_a_bad_way_change_nothing(
    tiny_weights, bucket, bucket_endpoint, tmp_path, monkeypatch
):
    asked = ["--model", tiny_weights / "generator", "--batch-size", 2]
    here, there = [*asked, "--pairs", tmp_path / "pairs"], [*asked, "--pairs", f"{bucket}/pairs"]
    for uri in (str(tmp_path / "pairs"), f"{bucket}/pairs"):
        write_pairs(uri, 20)
    with FaultyWay(bucket_endpoint, FAULTS) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        job = subprocess.Popen(
            command(*there, "--out", f"{bucket}/run"),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        notes = []
        while len(notes) < 2 and job.poll() is None:
            notes = storage.list_shards(f"{bucket}/run/.resume/latents")
            time.sleep(0.1)
        job.kill()
        job.wait()
        assert not storage.exists(f"{bucket}/run/latents/{storage.MANIFEST}")
        done = run_job(*there, "--out", f"{bucket}/run/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket_endpoint)
    assert done.returncode == 0, done.stderr
    assert f"encode_latents: {bucket}/run/latents has 20 pairs" in done.stdout
    assert way.counts["slow_down"] + way.counts["hang_up"] + way.counts["lost"] > 0
    whole = run_job(*here, "--out", tmp_path)
    assert whole.returncode == 0, whole.stderr
    storage.download(f"{bucket}/run/latents", tmp_path / "fetched")
    found, expected = contents(tmp_path / "fetched"), contents(tmp_path / "latents")
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert row[:2] == expected[key][:2]
        for ours, theirs in zip(row[2:5], expected[key][2:5], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4)
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    assert not uploads.get("Uploads")


def test_a_dry_run_for_a_bucket_asks_no_disk(bucket):
    plan = EncodingPlan(
        pairs=10, pair_bytes=1 << 60, seconds=1.0, actors=1, free_bytes=None, shape=(4, 8, 8)
    )
    plan.require_room(bucket)
    assert "free" not in " ".join(plan.lines())


@pytest.mark.timeout(900)
def test_what_a_bucket_refuses_is_one_sentence_before_a_model_is_looked_for(bucket, tmp_path):
    write_pairs(str(tmp_path / "pairs"), 2)
    for flags, refusal, told in refused(bucket, "--pairs", tmp_path / "pairs"):
        with FaultyWay("http://127.0.0.1:9", WayFaults(refusal=refusal)) as way:
            environment = {"AWS_ENDPOINT_URL": way.url} if refusal else {}
            done = run_job(*flags, "--model", tmp_path / "none", **environment)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("encode_latents: s3://")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1
