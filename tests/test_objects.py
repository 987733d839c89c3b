"""Objects against a server that speaks S3, and against what goes wrong on the way to it."""

import os
import subprocess
import sys
import tracemalloc

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray import object_files, objects, s3, storage
from ip2p_ray.errors import DatasetError
from ip2p_ray.schema import CAPTIONS
from ip2p_ray.stages import run
from ip2p_ray.testing import FaultyWay, WayFaults, bucket_process

ROWS = [{"caption_key": f"k{n}", "caption": f"caption {n}", "url": None} for n in range(5)]
TABLE = pa.Table.from_pylist(ROWS, schema=CAPTIONS)


@pytest.fixture
def faulty(bucket, bucket_endpoint, monkeypatch):
    """A way to the bucket on which a quarter of the requests goes wrong."""
    faults = WayFaults(slow_down=0.08, hang_up=0.06, lost=0.05, cut=0.06)
    with FaultyWay(bucket_endpoint, faults) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        yield way


def test_what_is_written_is_read_replaced_listed_and_deleted(bucket):
    uri = f"{bucket}/some/folder"
    assert objects.size(f"{uri}/a") is None
    objects.write(f"{uri}/a", b"first")
    objects.write(f"{uri}/a", b"second")
    objects.write(f"{uri}/b/c", b"")
    objects.write(f"{bucket}/some/folder-2", b"no part of it")
    assert objects.read(f"{uri}/a") == b"second"
    assert objects.read(f"{uri}/a", 2) == b"cond"
    assert objects.size(f"{uri}/a") == 6
    assert objects.size(uri) is None
    assert [found[:2] for found in objects.listing(f"{uri}/")] == [("a", 6), ("b/c", 0)]
    objects.remove([f"{uri}/a", f"{uri}/never"])
    assert [found[:2] for found in objects.listing(uri)] == [("b/c", 0)]
    objects.remove_below(uri)
    assert [found[:2] for found in objects.listing(bucket)] == [("some/folder-2", 13)]
    with pytest.raises(DatasetError, match=f"{uri}/a cannot be read: there is no such object"):
        objects.read(f"{uri}/a")


def test_a_large_object_comes_in_parts(bucket):
    data = os.urandom(40 << 20)
    objects.write(f"{bucket}/large", data)
    assert objects.read(f"{bucket}/large") == data
    name, key = s3.split(f"{bucket}/large")
    etag = boto3.client("s3").head_object(Bucket=name, Key=key)["ETag"]
    assert etag.endswith('-3"')


def test_folders_are_listed_without_what_is_in_them(bucket):
    for name in ("a", "b/1", "b/2", "c/d/e", "bb/x"):
        objects.write(f"{bucket}/run/{name}", b"")
    assert list(objects.folders(f"{bucket}/run")) == ["b", "bb", "c"]
    assert list(objects.folders(bucket)) == ["run"]
    assert list(objects.folders(f"{bucket}/run/b")) == []


@pytest.mark.slow
def test_a_listing_and_a_deletion_come_in_pages(bucket):
    for number in range(1005):
        objects.write(f"{bucket}/many/{number:04d}", b"")
    assert [found.name for found in objects.listing(f"{bucket}/many")] == [
        f"{number:04d}" for number in range(1005)
    ]
    objects.remove_below(f"{bucket}/many")
    assert list(objects.listing(f"{bucket}/many")) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_100_000_objects_are_listed_a_page_at_a_time(bucket, monkeypatch):
    with (
        bucket_process(bucket="many", keys=100_000) as endpoint,
        FaultyWay(endpoint) as way,
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        found, peaks = objects.listing("s3://many/folder"), []
        tracemalloc.start()
        try:
            for number in range(100_000):
                assert next(found).name == f"{number:06d}"
                if number == 5_000:
                    assert way.counts["GET"] == 6
                    peaks.append(tracemalloc.get_traced_memory()[1])
                    tracemalloc.reset_peak()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert next(found, None) is None
        assert way.counts["GET"] == 100
    assert peaks[1] < 1.5 * peaks[0] < 30e6, "memory grows with what was listed"


def test_what_a_killed_process_was_uploading_goes(bucket):
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for key in ("run/pairs/a", "run/pairs/b", "run/pairs-2/a"):
        begun = client.create_multipart_upload(Bucket=name, Key=key)
        client.upload_part(
            Bucket=name, Key=key, PartNumber=1, UploadId=begun["UploadId"], Body=b"a"
        )
    assert objects.abort_uploads(f"{bucket}/run/pairs/") == 2
    left = client.list_multipart_uploads(Bucket=name)["Uploads"]
    assert [begun["Key"] for begun in left] == ["run/pairs-2/a"]
    assert objects.abort_uploads(f"{bucket}/run/pairs") == 0


def test_a_dataset_that_is_made_clears_such_uploads_where_it_may(
    bucket, bucket_endpoint, monkeypatch
):
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    client.create_multipart_upload(Bucket=name, Key="run/pairs/a")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with FaultyWay("http://127.0.0.1:9", WayFaults(refusal=(403, "AccessDenied"))) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        storage.abort_uploads(f"{bucket}/run/pairs")
        assert way.counts["GET"] == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket_endpoint)
    run.make(f"{bucket}/run/pairs", run.Origin(dataset="pairs", config={}), list)
    assert not client.list_multipart_uploads(Bucket=name).get("Uploads")


@pytest.mark.parametrize(
    ("method", "code"), [("GET", "NoSuchKey"), ("DELETE", "NoSuchUpload"), ("DELETE", "404")]
)
def test_uploads_that_are_not_found_end_nothing(bucket, bucket_endpoint, monkeypatch, method, code):
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for key in ("run/a", "run/b"):
        client.create_multipart_upload(Bucket=name, Key=key)
    faults = WayFaults(refusal=(404, code), methods=(method,))
    with FaultyWay(bucket_endpoint, faults) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        storage.abort_uploads(f"{bucket}/run")
        assert way.counts["DELETE"] == (2 if method == "DELETE" else 0)


def test_faults_on_the_way_are_met_by_another_attempt(faulty, bucket):
    data = {f"{number:02d}": os.urandom(5000 * number) for number in range(10)}
    for name, content in data.items():
        objects.write(f"{bucket}/few/{name}", content)
    assert [found.name for found in objects.listing(f"{bucket}/few")] == list(data)
    for name, content in data.items():
        assert objects.read(f"{bucket}/few/{name}") == content
        assert object_files.opened(f"{bucket}/few/{name}").read() == content
    assert min(faulty.counts[kind] for kind in ("slow_down", "hang_up", "cut")) > 0


def test_a_dataset_lies_in_a_bucket_as_it_does_in_a_folder(bucket):
    uri = f"{bucket}/run/captions"
    storage.write_shard(uri, "captions-00001", TABLE.slice(3))
    storage.write_shard(uri, "captions-00000", TABLE.slice(0, 3))
    with pytest.raises(DatasetError, match="is not whole: it has no manifest"):
        storage.read_dataset(uri, CAPTIONS)
    assert storage.require_manifest(uri, allow_incomplete=True) is None
    with pytest.raises(DatasetError, match="does not exist"):
        storage.require_manifest(f"{bucket}/run/other", allow_incomplete=True)
    made = storage.write_manifest(uri, storage.Manifest(dataset="captions"))
    assert [shard.rows for shard in made.shards] == [3, 2]
    assert storage.require_manifest(uri) == storage.read_manifest(uri)
    assert storage.read_manifest(uri).shards == made.shards
    assert storage.list_shards(uri) == [f"{uri}/captions-0000{n}.parquet" for n in range(2)]
    assert storage.read_dataset(uri, CAPTIONS).to_pylist() == ROWS
    storage.write_bytes(f"{uri}/captions-00001.parquet", b"PAR1")
    with pytest.raises(DatasetError, match=r"captions-00001\.parquet is missing or changed"):
        storage.read_dataset(uri, CAPTIONS)
    with pytest.raises(DatasetError, match=r"captions-00001\.parquet is no whole Parquet file"):
        storage.write_manifest(uri, made)
    assert storage.read_manifest(uri).shards == made.shards
    storage.remove(f"{uri}/captions-00001.parquet")
    assert storage.exists(f"{uri}/{storage.MANIFEST}")
    storage.write_bytes(f"{uri}-2", b"no part of it")
    assert storage.any_there(uri)
    storage.remove_all(uri)
    assert not storage.any_there(uri)
    assert storage.exists(f"{uri}-2")


def test_a_dataset_survives_faults_on_the_way(faulty, bucket):
    uri = f"{bucket}/captions"
    for number in range(3):
        storage.write_shard(uri, f"captions-{number:05d}", TABLE)
    storage.write_manifest(uri, storage.Manifest(dataset="captions"))
    assert storage.read_dataset(uri, CAPTIONS).to_pylist() == 3 * ROWS
    assert faulty.counts["slow_down"] + faulty.counts["cut"] + faulty.counts["hang_up"] > 0


KILLED = """
import os, sys
from ip2p_ray import objects
uri = sys.argv[1]
print("ready", flush=True)
while True:
    for byte in (b"a", b"b"):
        objects.write(uri, byte * (20 << 20))
"""


@pytest.mark.parametrize("pause", [0.05, 0.3])
def test_a_killed_upload_leaves_the_object_that_was_there(bucket, pause):
    uri = f"{bucket}/large"
    objects.write(uri, b"b" * (20 << 20))
    command = [sys.executable, "-c", KILLED, uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(pause)
        process.kill()
    found = objects.read(uri)
    assert len(found) == 20 << 20
    assert found in (b"a" * (20 << 20), b"b" * (20 << 20))


def test_shards_are_plain_parquet_for_others(bucket):
    storage.write_shard(bucket, "part/a", TABLE)
    system, path = s3.filesystem(bucket)
    assert pq.read_table(f"{path}/part/a.parquet", filesystem=system).num_rows == 5
    assert storage.list_shards(bucket) == [f"{bucket}/part/a.parquet"]
