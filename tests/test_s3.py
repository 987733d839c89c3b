"""The way to a store: what is asked of it, and what it refuses in one sentence."""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray import object_files, objects, s3, storage
from ip2p_ray.errors import ConfigError, StorageError
from ip2p_ray.schema import CAPTIONS
from ip2p_ray.stages import run
from ip2p_ray.testing import FaultyWay, WayFaults

ROWS = [{"caption_key": f"k{n}", "caption": f"caption {n}", "url": None} for n in range(5)]
TABLE = pa.Table.from_pylist(ROWS, schema=CAPTIONS)


def test_uris():
    assert s3.split("s3://bucket/a/b/") == ("bucket", "a/b")
    assert s3.split("s3://bucket") == ("bucket", "")
    assert s3.is_object("s3://bucket/a")
    assert not s3.is_object("some/folder")
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert storage.absolute("file:///data/a") == "/data/a"


def test_arrow_tries_as_often_in_another_process(bucket, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    with FaultyWay("http://127.0.0.1:9", WayFaults(refusal=(503, "SlowDown"))) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        system, path = s3.filesystem(f"{bucket}/a")
        for expected in (4, 8):
            with pytest.raises(OSError, match="HTTP status 503") as raised:
                system.open_input_file(path)
            assert str(run.own_error(raised.value)).endswith("the same command goes on")
            assert way.counts["HEAD"] == expected
            system = pickle.loads(pickle.dumps(system))


def test_what_arrow_writes_is_one_request_while_it_is_small(bucket, bucket_endpoint, monkeypatch):
    with FaultyWay(bucket_endpoint) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        system, path = s3.filesystem(f"{bucket}/a.parquet")
        pq.write_table(TABLE, path, filesystem=system)
        assert (way.counts["PUT"], way.counts["POST"]) == (1, 0)
        assert storage.count_rows(f"{bucket}/a.parquet") == 5


def test_a_store_that_thinks_for_a_while_is_not_asked_again(bucket, bucket_endpoint, monkeypatch):
    with FaultyWay(bucket_endpoint, WayFaults(pause_s=9.0, methods=("PUT",))) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        system, path = s3.filesystem(f"{bucket}/a.parquet")
        pq.write_table(TABLE, path, filesystem=system)
        assert way.counts["PUT"] == 1


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("AccessDenied", 403, "access is denied: the credentials in use have no right to it"),
        ("ExpiredToken", 400, "the credentials have expired; renew them"),
        ("InvalidAccessKeyId", 403, "the credentials are refused; check AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, "the credentials are refused; check AWS_ACCESS_KEY_ID"),
        ("SlowDown", 503, "the store kept answering that it is overloaded"),
        ("Odd", 400, "failed: Odd as it was told"),
    ],
)
def test_what_a_server_refuses_is_one_sentence(bucket, monkeypatch, code, status, told, tmp_path):
    with FaultyWay("http://127.0.0.1:9", WayFaults(refusal=(status, code))) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        for ask in (
            lambda: objects.check(bucket),
            lambda: objects.read(f"{bucket}/a"),
            lambda: objects.read_file(f"{bucket}/a", tmp_path / "a"),
            lambda: objects.write(f"{bucket}/a", b"a"),
            lambda: objects.size(f"{bucket}/a"),
            lambda: list(objects.listing(bucket)),
            lambda: objects.remove([f"{bucket}/a"]),
            lambda: object_files.opened(f"{bucket}/a"),
            lambda: storage.read_dataset(bucket, CAPTIONS),
            lambda: storage.write_shard(bucket, "a", TABLE),
        ):
            with pytest.raises(StorageError, match=told) as raised:
                ask()
            assert str(raised.value).startswith(bucket)
            assert "\n" not in str(raised.value)


def test_a_wrong_bucket_is_told(bucket):
    for ask in (
        objects.check,
        lambda uri: objects.write(f"{uri}/a", b"a"),
        lambda uri: objects.read(f"{uri}/a"),
        lambda uri: objects.size(f"{uri}/a"),
        lambda uri: object_files.opened(f"{uri}/a"),
        lambda uri: storage.read_dataset(uri, CAPTIONS),
    ):
        with pytest.raises(StorageError, match=r"there is no bucket test-none at http://127"):
            ask("s3://test-none/folder")
    for uri in ("s3://", "s3:///key", "s3://b$/key"):
        with pytest.raises(ConfigError, match="names no bucket: give s3://bucket/folder"):
            objects.check(uri)


def test_a_server_that_is_not_there_is_told(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for ask in (objects.check, object_files.opened, lambda uri: objects.write(uri, b"")):
        with pytest.raises(StorageError, match=r"at http://127\.0\.0\.1:9 cannot be reached"):
            ask(f"{bucket}/a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nothing")
    with pytest.raises(ConfigError, match="object storage is not set up: Invalid endpoint"):
        objects.check(bucket)


def test_what_an_address_has_before_its_host_is_not_told(bucket, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for host in ("127.0.0.1:9", "127.0.0.1:no"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:planted@{host}")
        for ask in (objects.check, object_files.opened):
            with pytest.raises((StorageError, ConfigError)) as raised:
                ask(f"{bucket}/a")
            assert "planted" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["hang_up", "slow_down"])
def test_a_store_that_is_away_for_a_while_ends_nothing(bucket, bucket_endpoint, monkeypatch, fault):
    """Of many requests at once too, whose failures use up what boto3 allows of them."""
    for number in range(12):
        objects.write(f"{bucket}/{number}", b"before")
    with FaultyWay(bucket_endpoint) as way, ThreadPoolExecutor() as pool:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        objects.read(f"{bucket}/0")
        way.faults = WayFaults(**{fault: 1.0})
        asked = [pool.submit(objects.read, f"{bucket}/{number}") for number in range(8)]
        asked.append(pool.submit(lambda: object_files.opened(f"{bucket}/8").read()))
        written = pool.submit(objects.write, f"{bucket}/9", b"after")
        time.sleep(45.0)
        assert not any(each.done() for each in (*asked, written))
        way.faults = WayFaults()
        assert {each.result() for each in asked} == {b"before"}
        written.result()
        assert objects.read(f"{bucket}/9") == b"after"


def test_missing_credentials_are_told(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="there are no credentials for object storage; set AWS_"):
        objects.check(bucket)


def test_credentials_that_stay_expired_are_one_sentence():
    """botocore raises a bare RuntimeError of them."""
    told = "s3://b/a: Credentials were refreshed"
    with pytest.raises(StorageError, match=told), s3.in_words("s3://b/a"):
        raise RuntimeError("Credentials were refreshed, but are still expired.")
