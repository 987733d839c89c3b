"""The pairs stage in a bucket, with faults on the way and a kill: it ends as in a folder."""

import json
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest

from ip2p_ray import objects, s3, storage
from ip2p_ray.schema import PAIRS, REJECTS, SCORES
from ip2p_ray.testing import FaultyWay, WayFaults
from ip2p_ray.testing.pairs import write_triplets

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

DRIVER = Path(__file__).parent / "pairs_driver.py"
TRIPLETS = 28  # two parts of the driver's
FAULTS = WayFaults(slow_down=0.03, hang_up=0.02, lost=0.02, cut=0.02)
SCHEMAS = {"scores": SCORES, "pairs": PAIRS, "rejects/pairs": REJECTS}


def start(log, *folders):
    """The driver with one generator, which makes the pairs in each of the folders."""
    triplets = f"{folders[0].rpartition('/')[0]}/triplets"
    first, *others = folders
    return subprocess.Popen(
        [sys.executable, DRIVER, triplets, first, "1", "0.1", log, *others],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(log):
    """Who made which triplet."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def kill_after_notes(driver, folder, count):
    """Ends it by SIGKILL once so many rows are noted as written; returns how many are."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and driver.poll() is None:
        names = [found.name for found in objects.listing(folder)]
        notes = [n for n in names if "/.resume/" in n and not n.endswith(".pending.parquet")]
        if len(notes) >= count:
            driver.kill()
            driver.wait()
            return len(notes)
        time.sleep(0.2)
    raise AssertionError(driver.communicate()[0])


def test_a_killed_run_on_a_bad_way_ends_as_one_in_a_folder(
    bucket, bucket_endpoint, tmp_path, monkeypatch
):
    there, here, log = f"{bucket}/run", tmp_path / "run", tmp_path / "log.jsonl"
    write_triplets(f"{bucket}/triplets", TRIPLETS)
    with FaultyWay(bucket_endpoint, FAULTS) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        noted = kill_after_notes(start(log, there), there, 3)
        first = {line["pid"] for line in lines(log)}
        again = start(log, there, here)
        told, _ = again.communicate()
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket_endpoint)
    assert again.returncode == 0, told
    assert min(way.counts[kind] for kind in ("slow_down", "hang_up", "lost", "cut")) > 0

    for name, schema in SCHEMAS.items():
        ours, theirs = (storage.read_dataset(f"{place}/{name}", schema) for place in (there, here))
        assert ours.equals(theirs), name
        shards = [
            [(shard.name, shard.rows) for shard in storage.read_manifest(f"{place}/{name}").shards]
            for place in (there, here)
        ]
        assert shards[0] == shards[1]
    assert storage.read_dataset(f"{there}/scores", SCORES).num_rows == 4 * TRIPLETS
    assert len({line["key"] for line in lines(log)}) == TRIPLETS
    made = [line for line in lines(log) if line["pid"] not in first]
    assert len(made) <= 2 * TRIPLETS - noted, "a noted triplet was made again"

    client, name = boto3.client("s3"), s3.split(bucket)[0]
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=name)["Contents"]]
    assert "run/pairs.html" in keys
    assert not [key for key in keys if ".work" in key or key.endswith("/.lock")]
    assert not client.list_multipart_uploads(Bucket=name).get("Uploads")
