"""`ray job submit` to a real head: what an operator types, and what comes of it."""

import os
import platform
import secrets
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.jobs.cluster import RAY, ROOT, ray_head
from tests.jobs.running import Job, shards_below

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

GENERATE = ("jobs/generate_pairs.py", "--limit", 10, "--candidates", 4, "--steps", 30)
GENERATE += ("--batch-size", 4)
LIMIT_S = 900
"""For one job, where others work on the same cores."""

ENDS = ("SUCCEEDED", "FAILED", "STOPPED")


class Cluster:
    """A head, and jobs submitted to it from this checkout."""

    def __init__(self, address):
        from ray.job_submission import JobSubmissionClient

        self.address = address
        self.client = JobSubmissionClient(address)

    def submit(self, *command):
        """The id of a job that has been submitted."""
        entrypoint = " ".join(["python", *map(str, command)])
        return self.client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(ROOT)})

    def status(self, job):
        return str(self.client.get_job_status(job).value)

    def wait(self, job, limit_s=LIMIT_S):
        """(status, logs) of the job once it has ended."""
        deadline = time.monotonic() + limit_s
        while self.status(job) not in ENDS:
            assert time.monotonic() < deadline, self.client.get_job_logs(job)
            time.sleep(0.5)
        return self.status(job), self.client.get_job_logs(job)

    def succeed(self, *command, connects=True):
        """The logs of a job that has ended well, and whose driver worked in this cluster."""
        job = self.submit(*command)
        status, logs = self.wait(job)
        assert status == "SUCCEEDED", logs
        # a driver that had started a Ray of its own would have none here
        assert (self.client.get_job_info(job).driver_info is not None) is connects
        return logs


@pytest.fixture(scope="module")
def cluster():
    with ray_head(cpus=4) as address:
        yield Cluster(address)


@pytest.fixture(scope="module")
def quickstart(cluster, tmp_path_factory):
    """The folder of `quickstart --smoke`, submitted as the docstring of the job says."""
    out = tmp_path_factory.mktemp("shared") / "quickstart"
    command = [RAY, "job", "submit", "--address", cluster.address, "--working-dir", "."]
    command += ["--", "python", "jobs/quickstart.py", "--smoke", "--out", out]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    return out


@pytest.fixture(scope="module")
def generated(cluster, quickstart):
    """What an undisturbed generate_pairs makes."""
    out = quickstart.parent / "whole"
    cluster.succeed(*GENERATE, "--triplets", quickstart / "triplets", "--out", out)
    return out


def whole(folder):
    """The rows of each dataset below a folder; every one of them is whole."""
    from ip2p_ray import storage

    found = {}
    for place in sorted(folder.glob("*/_origin.json")):
        manifest = storage.require_manifest(str(place.parent))
        found[place.parent.name] = manifest.rows
    return found


def keys(folder, dataset):
    from ip2p_ray import schema, storage

    name = "triplet_key" if dataset == "candidates" else "pair_key"
    kept = {"candidates": schema.CANDIDATES, "pairs": schema.PAIRS, "scores": schema.SCORES}
    table = storage.read_dataset(str(folder / dataset), kept[dataset], columns=[name])
    return sorted(table[name].to_pylist())


def test_the_quickstart_makes_everything_on_the_cluster(cluster, quickstart):
    made = whole(quickstart)
    assert {"captions", "triplets", "candidates", "pairs", "latents"} <= set(made)
    assert all(made[name] for name in ("captions", "triplets", "candidates"))
    assert (quickstart / "report.html").stat().st_size > 0


def test_a_job_runs_the_code_that_was_sent_and_so_do_its_workers(cluster):
    """Not a copy that happens to be installed there, and not a Ray of the job's own."""
    probe = (
        "import os, ray, ip2p_ray\n"
        "from ip2p_ray.stages import run\n"
        "def where():\n"
        "    import ip2p_ray\n"
        "    return ip2p_ray.__file__\n"
        "with run.local_ray(workers=1):\n"
        "    print('driver', ip2p_ray.__file__)\n"
        "    print('worker', ray.get(ray.remote(where).remote()))\n"
        "    print('address', ray.get_runtime_context().gcs_address, os.environ['RAY_ADDRESS'])\n"
    )
    logs = cluster.succeed(f'-c "{probe}"')
    told = dict(line.split(" ", 1) for line in logs.splitlines() if line.count(" ") >= 1)
    for who in ("driver", "worker"):
        assert "/working_dir_files/_ray_pkg_" in told[who]
    assert len(set(told["address"].split())) == 1


def test_pairs_latents_training_and_evaluation_go_on_from_what_was_made(
    cluster, quickstart, generated
):
    assert whole(generated)["candidates"] == 10
    out = quickstart.parent / "editor"
    latents = quickstart / "latents"
    flags = ("--steps", 4, "--batch-size", 4, "--micro-batch", 2, "--workers", 2)
    cluster.succeed("jobs/train_editor.py", "--latents", latents, "--out", out, *flags)
    assert (out / "editor" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    scores = quickstart.parent / "evaluation"
    flags = ("--tasks", 3, "--steps", 2, "--image-guidance-scales", 1.0, "--strengths", 0.5)
    flags += ("--self-replaces", 0.5, "--resamples", 100, "--shown", 3, "--actors", 1)
    cluster.succeed("jobs/evaluate_editor.py", "--editor", out / "editor", "--out", scores, *flags)
    assert (scores / "metrics.json").stat().st_size > 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--triplets", "/nowhere", "--candidats", 3], "--candidats"),
        (["--triplets", "/nowhere", "--out", "{out}"], "dataset /nowhere does not exist"),
        (["--triplets", "/nowhere", "--out", "runs/pairs"], "--out runs/pairs"),
    ],
)
def test_what_cannot_work_is_a_failed_job_that_says_why(cluster, tmp_path, flags, told):
    flags = [str(flag).format(out=tmp_path / "out") for flag in flags]
    job = cluster.submit("jobs/generate_pairs.py", *flags)
    status, logs = cluster.wait(job)
    assert status == "FAILED"
    assert told in "\n".join(logs.splitlines()[-12:])
    assert "Traceback" not in logs


def test_a_stopped_job_leaves_what_the_same_command_completes(cluster, quickstart, generated):
    out = quickstart.parent / "stopped"
    command = (*GENERATE, "--triplets", quickstart / "triplets", "--out", out)
    job = cluster.submit(*command)
    while not shards_below(out / "candidates"):
        assert cluster.status(job) not in ENDS, cluster.client.get_job_logs(job)
        time.sleep(0.1)
    cluster.client.stop_job(job)
    assert cluster.wait(job)[0] == "STOPPED"
    assert not (out / "candidates" / "_manifest.json").exists()
    cluster.succeed(*command)
    for dataset in ("candidates", "scores", "pairs"):
        assert keys(out, dataset) == keys(generated, dataset)
    assert whole(out) == whole(generated)
    assert not [path for path in Path(out).rglob("*") if path.name.endswith((".tmp", ".partial"))]


def test_a_preflight_tells_that_all_is_well(cluster, tmp_path):
    done = Job("preflight.py").run("--address", cluster.address, "--storage", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong: " not in done.stdout
    assert (
        f"fine: {cluster.address} ran a job, in Python {platform.python_version()}" in done.stdout
    )
    logs = cluster.succeed("jobs/preflight.py", "--storage", tmp_path, connects=False)
    assert f"fine: {tmp_path} can be listed and written to" in logs


def test_a_head_with_a_token_answers_nobody_else():
    token = secrets.token_hex(32)
    with ray_head(token=token) as address:
        for path in ("/api/jobs/", "/api/version", "/nodes?view=summary"):
            assert httpx.get(address + path, timeout=30).status_code == 401
        wrong = {"RAY_AUTH_MODE": "disabled"}
        done = Job("preflight.py").run("--address", address, **wrong)
        assert done.returncode == 1
        assert f"wrong: {address} wants a token (401): export RAY_AUTH_MODE=token" in done.stdout
        right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        done = Job("preflight.py").run("--address", address, **right)
        assert done.returncode == 0, done.stdout + done.stderr
        assert token not in done.stdout + done.stderr
