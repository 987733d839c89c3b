"""What holds for every test: no network, no deadlines, the same examples each time.

And what the tests that start Ray share: one small Ray, and one run of the whole flow in it.
"""

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are tiny: threads wait for each other longer than they compute, the more so where other
# work runs, and one thread adds up in the same order every time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Serve's replicas report once in 10 s else, and a test of autoscaling waits for it several times.
for reporter in ("REPLICA", "HANDLE"):
    os.environ.setdefault(f"RAY_SERVE_{reporter}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
# Its controller kills a proxy that has not started three times this long.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")

# A shell that starts the tests in the background has them and what they start ignore Ctrl-C, which
# some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Warnings are errors, but Ray's own are not ours to mend; and Ray is slow to start."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A folder like the miniature's weights, small and random; made in some seconds."""
    from ip2p_ray.miniature.tiny import tiny_miniature

    return tiny_miniature(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="session")
def bucket_endpoint():
    """Of the one server of the test session that speaks S3."""
    from ip2p_ray.testing import bucket_process

    with bucket_process() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(bucket_endpoint, monkeypatch):
    """The URI of an empty bucket there; the environment names the server and a key to it."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": bucket_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid4().hex[:12]}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def local_ray():
    """The one Ray of the test session."""
    from ip2p_ray.stages.run import local_ray

    with local_ray(workers=2):
        yield


@dataclass(frozen=True)
class Made:
    """A finished run of the whole flow."""

    folder: Path
    preset: object
    questions: object
    captions: int

    def uri(self, name: str) -> str:
        """Of one of its datasets."""
        return str(self.folder / name)


@pytest.fixture(scope="session")
def made(local_ray, tiny_weights, tmp_path_factory):
    """The flow on the tiny weights: 10 captions, the last two of which the writer does not know."""
    from ip2p_ray import presets
    from ip2p_ray.evaluation import EvaluationConfig
    from ip2p_ray.stages.flow import make_datasets

    preset = presets.miniature(tiny_weights)
    preset = replace(preset, training=replace(preset.training, steps=9, batch_size=4))
    questions = EvaluationConfig(tasks=3, shown=2, curve_tasks=2, image_guidance_scales=(1.0, 1.5))
    folder = tmp_path_factory.mktemp("made")
    make_datasets(str(folder), preset, questions, captions=10, seed=0, workers=2)
    return Made(folder, preset, questions, captions=10)
