import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import numpy as np
import psutil
import pyarrow as pa
import pytest
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from ip2p_ray import objects, storage
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.latents import encode_pairs
from ip2p_ray.schema import LATENTS, PAIRS
from ip2p_ray.stages.training import read_metrics
from ip2p_ray.testing import FaultyWay, WayFaults, tiny_stable_diffusion
from tests.jobs.running import ROOT, Job

JOB = Job("train_editor.py")
command, run_job = JOB.command, JOB.run

FLAGS = {
    *(
        "--latents",
        "--pairs",
        "--out",
        "--cache",
        "--preset",
        "--start",
        "--dry-run",
        "--no-dry-run",
    ),
    *("--resolution", "--steps", "--batch-size", "--learning-rate", "--warmup-steps", "--decay"),
    *("--weight-decay", "--max-grad-norm", "--ema-horizon", "--dropout", "--min-snr-gamma"),
    *("--flips", "--seed", "--bf16", "--gradient-checkpointing", "--channels-last"),
    *(
        "--lora-rank",
        "--workers",
        "--most-workers",
        "--gpus",
        "--cpus",
        "--worker-resources",
        "--micro-batch",
        "--compile",
        "--no-compile",
    ),
    *("--readers", "--save-every", "--log-every", "--keep", "--mirror", "--validate-every"),
    *("--validation-groups", "--sample-every", "--samples", "--metrics"),
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""

EXACT = ("step", "epoch", "loss", "learning_rate", "grad_norm", "ema_decay", "validation_loss")
"""What of a line of metrics is the same in every run; the rest is time."""


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    told = done.stdout.partition("options")[2]
    found = set(re.findall(r"^\u2502 (--[a-z0-9-]+)", told, re.MULTILINE))
    found |= set(re.findall(r", (--no-[a-z-]+)", told))
    assert found == FLAGS


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "give either --latents or --pairs"),
        (["--latents", "l", "--pairs", "p"], "give either --latents or --pairs"),
        (["--latents", "l", "--resolution", "64"], "--resolution is for --pairs"),
        (["--latents", "l", "--workers", "0"], "--workers is above 0"),
        (["--latents", "l", "--workers", "3", "--most-workers", "2"], "--most-workers is at least"),
        (["--latents", "l", "--ema-horizon", "0.5"], "--ema-horizon is at least 1"),
        (["--latents", "l", "--dropout", "0.4"], "--dropout lies in"),
        (["--latents", "gs://b/l"], "--latents gs://b/l: give a folder here or s3://bucket/folder"),
        (["--latents", "l", "--out", "s3://"], "--out s3:// names no bucket"),
        (
            ["--latents", "l", "--out", "s3://b/o", "--mirror", "s3://b/m"],
            "--mirror is for an --out",
        ),
        (["--latents", "l", "--mirror", "/tmp/m"], "give s3://bucket/folder"),
        (["--latents", "l", "--metrics", "paper"], "--metrics"),
        (["--latents", "l", "--worker-resources", "GPU=1"], "GPU is Ray's own; it has flags"),
        (["--latents", "l", "--stepps", "3"], "--stepps"),
    ],
)
def test_a_wrong_flag_is_told_in_a_sentence(flags, told):
    done = run_job(*flags)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def data(tiny_weights, tmp_path_factory):
    """Datasets of 15 pairs of noise in 12 groups, and of their latents; two groups held out."""
    root = tmp_path_factory.mktemp("data")
    model = StableDiffusion.load(tiny_weights / "generator")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 15, 64, 64, 3), dtype=np.uint8)
    rows, latents = [], encode_pairs(model, *pictures)
    for number in range(15):
        images = ({"bytes": encode_png(to_pil(p[number])), "path": None} for p in pictures)
        rows.append(
            {
                "pair_key": f"pair {number:02d}",
                "triplet_key": f"triplet {number % 12:02d}",
                "instruction": f"make it {number % 3}",
                "split": "held_out" if number % 12 >= 10 else "train",
                **dict(zip(("source_image", "edited_image"), images, strict=True)),
                **latents[number],
            }
        )
    for name, schema in (("pairs", PAIRS), ("latents", LATENTS)):
        full = [dict.fromkeys(schema.names) | {k: r.get(k) for k in schema.names} for r in rows]
        storage.write_shard(
            str(root / name), "part-00000", pa.Table.from_pylist(full, schema=schema)
        )
        storage.write_manifest(
            str(root / name), storage.Manifest(dataset=name, recipe=f"noise {name}")
        )
    return root


@pytest.fixture
def asked(data, tiny_weights):
    """The flags of a short run."""
    start = ["--start", tiny_weights / "generator", "--steps", 8, "--batch-size", 4]
    return ["--latents", data / "latents", *start, "--log-every", 1, "--save-every", 2]


def test_missing_data_and_libraries_end_it_before_anything_starts(asked, tmp_path):
    done = run_job("--latents", tmp_path / "no", "--out", tmp_path)
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    done = run_job(*asked, "--out", tmp_path, "--metrics", "mlflow")
    assert done.returncode == 1
    assert "metrics to mlflow need the library mlflow" in done.stderr


@pytest.mark.parametrize("flag", ["--latents", "--out", "--mirror", "--start"])
def test_a_bucket_that_is_not_there_is_told_before_a_model_is_loaded(asked, bucket, tmp_path, flag):
    done = run_job(*asked, "--out", tmp_path, flag, "s3://test-none/it")
    assert done.returncode == 1
    assert "there is no bucket test-none at http://" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("code", "told"),
    [("AccessDenied", "access is denied"), ("ExpiredToken", "the credentials have expired")],
)
def test_a_bucket_that_refuses_is_told_before_a_model_is_loaded(
    asked, bucket, bucket_endpoint, code, told
):
    with FaultyWay(bucket_endpoint, WayFaults(refusal=(403, code))) as way:
        done = run_job(*asked, "--out", f"{bucket}/run", AWS_ENDPOINT_URL=way.url)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_too_little_memory_is_told_before_training(asked, tmp_path):
    many = ["--batch-size", 10_000_000, "--micro-batch", 10_000_000]
    done = run_job(*asked, *many, "--out", tmp_path)
    assert done.returncode == 1
    assert re.search(
        r"training: a worker on this machine would need [\d.]+ TB, [\d.]+ GB are free", done.stderr
    )
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.ray
def test_a_run_leaves_an_editor_with_card_samples_and_metrics(asked, data, tmp_path):
    watched = ["--validate-every", 4, "--sample-every", 8, "--samples", 2]
    done = run_job(*asked, *watched, "--metrics", "tensorboard", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan: 8 steps of 4 samples" in done.stdout
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "editor")
    assert pipeline.unet.config.in_channels == 2 * pipeline.vae.config.latent_channels
    card = (tmp_path / "editor" / "README.md").read_text()
    assert "| recipe | noise latents |" in card
    assert "| learning_rate | 0.0005 |" in card
    assert "| validation_loss | " in card
    noted = read_metrics(tmp_path / "checkpoints")
    assert [row["step"] for row in noted] == list(range(1, 9))
    assert [row["step"] for row in noted if "validation_loss" in row] == [4, 8]
    assert all(row["images_per_s"] > 0 and row["waited"] >= 0 for row in noted)
    with Image.open(tmp_path / "samples" / "step-00000008.png") as page:
        assert page.width > 3 * 64
        assert page.height > 2 * 64
    assert list((tmp_path / "tensorboard").glob("events.*"))

    again = run_job(*asked, *watched, "--out", tmp_path)
    assert again.returncode == 0, again.stderr
    assert "checkpoints: there already" in again.stdout
    other = run_job(*asked, "--out", tmp_path, "--learning-rate", 1e-3)
    assert other.returncode == 1
    assert "was made differently (learning_rate 0.0005 there, 0.001 now)" in other.stderr


@pytest.mark.ray
def test_an_editor_is_trained_further_on_pictures_with_lora_by_two_workers(asked, data, tmp_path):
    pictures = ["--pairs", data / "pairs", "--resolution", 48, *asked[2:]]
    flags = ["--steps", 3, "--lora-rank", 2, "--workers", 2, "--micro-batch", 1, "--readers", 2]
    start = tmp_path / "start"
    tiny_stable_diffusion(in_channels=8).save(start)
    flags += ["--start", start, "--validate-every", 3]
    done = run_job(*pictures, *flags, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    editor, before = Editor.load(tmp_path / "editor"), Editor.load(start)
    ours, theirs = (dict(one.model.unet.named_parameters()) for one in (editor, before))
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if not bool((ours[name] == theirs[name]).all())}
    assert {"conv_in.weight", "conv_in.bias"} < changed
    assert all("attn" in name for name in changed if not name.startswith("conv_in"))
    assert not any("norm" in name for name in changed)
    assert len(read_metrics(tmp_path / "checkpoints")) == 3


def curve(folder):
    return [
        {name: row[name] for name in EXACT if name in row}
        for row in read_metrics(storage.join(folder, "checkpoints"))
    ]


def workers_below(pid):
    """Process ids of Ray Train's workers below a process."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2400)
def test_kills_of_worker_and_driver_leave_the_same_curve_to_the_last_digit(asked, tmp_path):
    """A kill at random moments, of the worker (training goes on by itself) and of the driver."""
    flags = [*asked, "--steps", 240, "--save-every", 7, "--log-every", 3, "--validate-every", 5]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_job(*flags, "--out", whole)
    assert done.returncode == 0, done.stderr
    random, kills = np.random.default_rng(3), []
    wanted = ["worker", "driver", "worker"]
    while True:
        job = subprocess.Popen(
            command(*flags, "--out", killed),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while job.poll() is None:
            seen = len(read_metrics(killed / "checkpoints"))
            fresh = int(random.integers(3, 18))
            while job.poll() is None and len(read_metrics(killed / "checkpoints")) < seen + fresh:
                time.sleep(0.02)
            if job.poll() is not None or not wanted:
                break
            what = wanted[0]
            pids = [job.pid] if what == "driver" else workers_below(job.pid)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            if pids:
                kills.append(wanted.pop(0))
            if what == "driver":
                job.wait()
        if job.wait() == 0:
            break
        assert job.returncode == -signal.SIGKILL, job.stderr.read().decode()[-3000:]
    assert kills == ["worker", "driver", "worker"]
    assert curve(killed) == curve(whole)
    for name in ("unet", "ema", "optimizer"):
        part = f"checkpoints/step-00000240/{name}.safetensors"
        assert (killed / part).read_bytes() == (whole / part).read_bytes()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_another_number_of_workers_goes_on_with_the_same_statistics(asked, tmp_path):
    """One worker, then three that share a batch of four unevenly: losses agree to 1 %."""
    flags = [*asked, "--steps", 16, "--log-every", 1]
    done = run_job(*flags, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    root = tmp_path / "three" / "checkpoints"
    for name in ("_manifest.json", "step-00000016"):
        path = root / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    shutil.rmtree(tmp_path / "three" / "editor")
    assert json.loads((root / "step-00000014" / "state.json").read_text())["step"] == 14
    done = run_job(*flags, "--out", tmp_path / "three", "--workers", 3)
    assert done.returncode == 0, done.stderr
    ours, theirs = curve(tmp_path / "three"), curve(tmp_path / "one")
    assert ours[:14] == theirs[:14]
    assert [row["step"] for row in ours] == list(range(1, 17))
    for one, other in zip(ours[14:], theirs[14:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_run_goes_on_from_its_mirror_where_the_disk_is_lost(asked, bucket, tmp_path):
    flags = [*asked, "--mirror", f"{bucket}/run"]
    done = run_job(*flags, "--out", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    steps = {found.name.split("/")[0] for found in objects.listing(f"{bucket}/run")}
    assert steps == {"metrics.jsonl", "step-00000006", "step-00000008"}
    objects.remove_below(f"{bucket}/run/step-00000008")
    done = run_job(*flags, "--out", tmp_path / "second")
    assert done.returncode == 0, done.stderr
    assert f"goes on from step-00000006 of {bucket}/run" in done.stdout
    assert curve(tmp_path / "second") == curve(tmp_path / "first")
    for name in ("unet", "ema", "optimizer"):
        part = f"checkpoints/step-00000008/{name}.safetensors"
        assert (tmp_path / "second" / part).read_bytes() == (tmp_path / "first" / part).read_bytes()
    other = run_job(*flags, "--out", tmp_path / "third", "--learning-rate", 1e-3)
    assert other.returncode == 1
    assert "made differently, or of other data: give another --mirror" in other.stderr


@pytest.fixture
def stored(data, tiny_weights, bucket, tmp_path):
    """The flags of `asked` with everything in a bucket, and a cache for the machine."""
    storage.upload(data, bucket)
    storage.upload(tiny_weights / "generator", f"{bucket}/generator")
    start = ["--start", f"{bucket}/generator", "--steps", 8, "--batch-size", 4]
    flags = ["--latents", f"{bucket}/latents", *start, "--log-every", 1, "--save-every", 2]
    return [*flags, "--cache", tmp_path / "cache"]


def tree(uri):
    """What lies below a URI, without what tells the time."""
    if storage.is_local(uri):
        root = storage.local_path(uri)
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    else:
        names = [found.name for found in objects.listing(uri)]
    told = ("_origin.json", "_manifest.json", "metrics.jsonl", "README.md", ".lock")
    return {
        name: storage.read_bytes(storage.join(uri, name))
        for name in names
        if name.rpartition("/")[2] not in told
    }


def differing(one, other):
    """Names of what is not the same in both."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_of_a_folder(asked, stored, bucket, tmp_path):
    watched = ["--validate-every", 4, "--sample-every", 8, "--samples", 2]
    done = run_job(*asked, *watched, "--out", tmp_path / "here")
    assert done.returncode == 0, done.stderr
    watched += ["--metrics", "tensorboard"]
    done = run_job(*stored, *watched, "--out", f"{bucket}/run")
    assert done.returncode == 0, done.stderr
    assert re.search(
        rf"plan: each node keeps a copy of {bucket}/latents in .*/cache: [\d.]+ kB of", done.stdout
    )
    here, there = tree(tmp_path / "here"), tree(f"{bucket}/run")
    events = [name for name in there if name.startswith("tensorboard/events.")]
    assert len(events) == 1
    assert differing({name: there[name] for name in there if name not in events}, here) == []
    assert curve(f"{bucket}/run") == curve(tmp_path / "here")
    card = storage.read_bytes(f"{bucket}/run/editor/README.md").decode()
    assert f"{bucket}/generator" in card
    assert storage.read_manifest(f"{bucket}/run/checkpoints").config["steps"] == 8
    cache = tmp_path / "cache"
    assert sorted(path.name for path in cache.iterdir()) == ["datasets", "folders", "runs"]
    assert list((cache / "runs").iterdir()) == []
    assert len([path for path in (cache / "datasets").iterdir() if path.is_dir()]) == 1

    storage.remove_all(f"{bucket}/run/editor")
    again = run_job(*stored, *watched, "--out", f"{bucket}/run")
    assert again.returncode == 0, again.stderr
    assert "the editor is gone; exporting it again" in again.stdout
    assert not differing(tree(f"{bucket}/run/editor"), tree(tmp_path / "here" / "editor"))
    assert list((cache / "runs").iterdir()) == []

    broken = f"{bucket}/run/checkpoints/step-00000008/unet.safetensors"
    content = storage.read_bytes(broken)
    objects.write(broken, content[:-1] + bytes([content[-1] ^ 1]))
    storage.remove(f"{bucket}/run/checkpoints/_manifest.json")
    storage.remove_all(f"{bucket}/run/editor")
    again = run_job(*stored, *watched, "--out", f"{bucket}/run")
    assert again.returncode == 0, again.stderr
    told = "step-00000008 differs from its checksums; goes on at the one before"
    assert told in again.stdout  # a worker found it, and the driver says so
    assert not differing(tree(f"{bucket}/run/editor"), tree(tmp_path / "here" / "editor"))


def saved(run):
    """The steps of the checkpoints in a bucket."""
    names = (found.name.split("/") for found in objects.listing(f"{run}/checkpoints"))
    return {name[0] for name in names if name[-1] == "checksums.json"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2400)
def test_kills_and_lost_disks_and_faults_leave_the_same_bytes_in_the_bucket(
    stored, bucket, bucket_endpoint, tmp_path
):
    """The driver is killed at random moments, and the machine's disk is lost every time."""
    flags = [*stored, "--steps", 120, "--save-every", 7, "--log-every", 3]
    done = run_job(*flags, "--out", f"{bucket}/whole")
    assert done.returncode == 0, done.stderr
    random, kills = np.random.default_rng(5), 0
    faults = WayFaults(slow_down=0.03, hang_up=0.03, lost=0.03, cut=0.03)
    with FaultyWay(bucket_endpoint, faults) as way:
        while True:
            job = subprocess.Popen(
                command(*flags, "--out", f"{bucket}/killed"),
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "AWS_ENDPOINT_URL": way.url},
            )
            before = saved(f"{bucket}/killed")
            while job.poll() is None and (kills == 3 or saved(f"{bucket}/killed") <= before):
                time.sleep(0.05)
            if job.poll() is not None:
                break
            time.sleep(random.uniform(0.0, 1.0))
            below = psutil.Process(job.pid).children(recursive=True)
            for process in (job, *below):  # the machine is lost with all that runs on it
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            job.wait()
            kills += 1
            shutil.rmtree(tmp_path / "cache")
        assert job.returncode == 0, job.stderr.read().decode()[-3000:]
        assert all(way.counts[kind] for kind in ("slow_down", "hang_up", "lost", "cut"))
    assert kills == 3
    assert tree(f"{bucket}/killed") == tree(f"{bucket}/whole")
    assert curve(f"{bucket}/killed") == curve(f"{bucket}/whole")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_store_that_is_away_for_a_while_ends_no_training(stored, bucket, bucket_endpoint):
    with FaultyWay(bucket_endpoint) as way:
        job = subprocess.Popen(
            command(*stored, "--steps", 60, "--save-every", 7, "--out", f"{bucket}/run"),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "AWS_ENDPOINT_URL": way.url},
        )
        while not saved(f"{bucket}/run"):
            assert job.poll() is None, job.stderr.read().decode()[-3000:]
            time.sleep(0.1)
        way.faults = WayFaults(hang_up=1.0)
        time.sleep(45.0)
        assert way.counts["hang_up"] > 0
        way.faults = WayFaults()
        _, error = job.communicate(timeout=900)
        assert job.returncode == 0, error.decode()[-3000:]
    assert "step-00000060" in saved(f"{bucket}/run")
