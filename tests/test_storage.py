"""Datasets are whole or visibly not, whatever is killed when."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError, DatasetError
from ip2p_ray.report import Report
from ip2p_ray.schema import CAPTIONS

ROWS = [{"caption_key": f"k{n}", "caption": f"caption {n}", "url": None} for n in range(5)]
TABLE = pa.Table.from_pylist(ROWS, schema=CAPTIONS)


@pytest.fixture
def uri(tmp_path):
    """A whole dataset of two shards."""
    uri = str(tmp_path / "captions")
    storage.write_shard(uri, "captions-00001", TABLE.slice(3))
    storage.write_shard(uri, "captions-00000", TABLE.slice(0, 3))
    report = Report.count("captions", [None] * 5 + ["duplicate_caption"], 1.5)
    storage.write_manifest(
        uri,
        storage.Manifest(
            dataset="captions",
            config={"limit": 5},
            recipe="0123456789abcdef",
            models={"writer": "abc"},
            reports=[report.as_dict()],
            wall_seconds=1.5,
        ),
    )
    return uri


def names(folder):
    return sorted(path.name for path in storage.local_path(folder).iterdir())


def test_rows_come_back_in_the_order_of_the_shards(uri):
    table = storage.read_dataset(uri, CAPTIONS)
    assert table.to_pylist() == ROWS
    assert table.schema == CAPTIONS
    keys = storage.read_dataset(uri, CAPTIONS, columns=["caption_key"])
    assert keys.column_names == ["caption_key"]
    assert names(uri) == [storage.MANIFEST, "captions-00000.parquet", "captions-00001.parquet"]


def test_the_manifest_comes_back_whole(uri):
    manifest = storage.require_manifest(uri)
    assert manifest.rows == 5
    assert [shard.rows for shard in manifest.shards] == [3, 2]
    assert manifest.models == {"writer": "abc"}
    assert manifest.reports[0]["rejected"] == {"duplicate_caption": 1}
    assert storage.read_manifest(f"file://{uri}") == manifest


def test_a_dataset_without_manifest_is_refused_unless_allowed(uri):
    storage.local_path(storage.join(uri, storage.MANIFEST)).unlink()
    with pytest.raises(DatasetError, match="is not whole: it has no manifest; run the job"):
        storage.read_dataset(uri, CAPTIONS)
    assert storage.require_manifest(uri, allow_incomplete=True) is None
    assert storage.read_dataset(uri, CAPTIONS, allow_incomplete=True).num_rows == 5


@pytest.mark.parametrize("allow", [False, True])
def test_a_dataset_that_does_not_exist_is_refused_in_any_case(tmp_path, allow):
    with pytest.raises(DatasetError, match="does not exist"):
        storage.read_dataset(tmp_path / "nothing", CAPTIONS, allow_incomplete=allow)


def test_a_missing_or_changed_shard_is_noticed(uri):
    path = storage.local_path(storage.list_shards(uri)[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DatasetError, match=r"captions-00000\.parquet is missing or changed"):
        storage.read_dataset(uri, CAPTIONS)
    path.unlink()
    with pytest.raises(DatasetError, match=r"captions-00000\.parquet is missing or changed"):
        storage.require_manifest(uri, allow_incomplete=True)


def test_a_shard_that_the_manifest_does_not_list_is_not_read(uri):
    storage.write_shard(uri, "stray", TABLE)
    assert storage.read_dataset(uri, CAPTIONS).num_rows == 5


def test_a_broken_shard_is_noticed_before_the_manifest_is_written(uri):
    storage.write_bytes(storage.join(uri, "captions-00002.parquet"), b"PAR1")
    before = storage.read_manifest(uri)
    with pytest.raises(DatasetError, match=r"captions-00002\.parquet is no whole Parquet file"):
        storage.write_manifest(uri, before)
    assert storage.read_manifest(uri) == before


def test_columns_that_are_missing_or_of_another_type_are_noticed(tmp_path):
    uri = tmp_path / "captions"
    storage.write_shard(uri, "a", TABLE.drop_columns(["url"]))
    with pytest.raises(DatasetError, match=r"a\.parquet does not have the expected columns"):
        storage.read_dataset(uri, CAPTIONS, allow_incomplete=True)
    storage.write_shard(uri, "a", TABLE.set_column(1, "caption", pa.array([[1]] * 5)))
    with pytest.raises(DatasetError, match=r"a\.parquet does not have the expected columns"):
        storage.read_dataset(uri, CAPTIONS, allow_incomplete=True)


def test_a_column_of_nulls_only_reads_as_its_type(tmp_path):
    # Ray Data writes such a column with the type null.
    nulls = TABLE.set_column(2, "url", pa.nulls(5))
    storage.write_shard(tmp_path, "a", nulls)
    assert storage.read_dataset(tmp_path, CAPTIONS, allow_incomplete=True).schema == CAPTIONS


def test_an_empty_dataset_is_a_dataset(tmp_path):
    manifest = storage.write_manifest(tmp_path / "none", storage.Manifest(dataset="captions"))
    assert manifest.rows == 0
    assert storage.read_dataset(tmp_path / "none", CAPTIONS).schema == CAPTIONS


def test_another_schema_version_or_a_broken_manifest_is_refused(uri):
    path = storage.local_path(uri) / storage.MANIFEST
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema_version": 99}))
    with pytest.raises(DatasetError, match="has schema version 99, this code reads"):
        storage.require_manifest(uri)
    for text in ("{", "[]", "{}", json.dumps({**values, "colour": "red"})):
        path.write_text(text)
        with pytest.raises(DatasetError, match=r"_manifest\.json cannot be read"):
            storage.require_manifest(uri)


def test_leftovers_of_a_killed_run_are_no_shards_and_go_with_the_manifest(uri):
    folder = storage.local_path(uri)
    left = folder / ".captions-7.parquet.partial"
    (left / "new").mkdir(parents=True)
    for path in (left / "new" / "shard.parquet", folder / "_temporary.parquet"):
        path.write_bytes(b"half")
    assert len(storage.list_shards(uri)) == 2
    storage.write_manifest(uri, storage.read_manifest(uri))
    assert not left.exists()


def test_a_dataset_is_deleted_with_all_that_lies_in_its_folder(tmp_path, uri):
    storage.write_manifest(uri, storage.Manifest(dataset="captions"))
    assert storage.any_there(uri)
    for _ in range(2):  # the second finds nothing
        storage.remove_all(uri)
        assert not storage.any_there(uri)
    assert list(tmp_path.iterdir()) == []


def test_shards_may_lie_in_folders(tmp_path):
    storage.write_shard(tmp_path, "part/b", TABLE)
    storage.write_shard(tmp_path, "a", TABLE)
    assert storage.list_shards(tmp_path) == [f"{tmp_path}/a.parquet", f"{tmp_path}/part/b.parquet"]


def test_uris():
    assert str(storage.local_path("file:///data/a%20b")) == "/data/a b"
    assert str(storage.local_path("some/folder#1?x")) == "some/folder#1?x"
    assert storage.join("file:///data/", "pairs", "a.parquet") == "file:///data/pairs/a.parquet"
    for uri in ("s3://bucket/pairs", "https://host/x", "file://host/x"):
        with pytest.raises(ConfigError, match="only local paths and file:/// URIs are supported"):
            storage.local_path(uri)


def test_a_manifest_with_values_json_cannot_hold_is_not_written(tmp_path):
    manifest = storage.Manifest(dataset="captions", wall_seconds=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        storage.write_manifest(tmp_path, manifest)
    assert names(tmp_path) == []
    assert dataclasses.replace(manifest, wall_seconds=0.0).rows == 0


def test_shards_are_plain_parquet(uri):
    assert pq.read_table(storage.list_shards(uri)[0]).num_rows == 3


def test_a_manifest_in_a_bucket_counts_each_shard_as_in_a_folder(bucket, tmp_path):
    places = (f"{bucket}/captions", str(tmp_path / "captions"))
    for uri in places:
        for number in range(40):
            storage.write_shard(uri, f"captions-{number:05d}", TABLE.slice(number % 5))
    in_bucket, in_folder = (
        storage.write_manifest(uri, storage.Manifest(dataset="captions")) for uri in places
    )
    assert in_bucket.shards == in_folder.shards
    assert [shard.rows for shard in in_bucket.shards] == [5 - number % 5 for number in range(40)]


def test_a_manifest_in_a_bucket_names_the_shard_that_is_none(bucket):
    uri = f"{bucket}/captions"
    for number in range(20):
        storage.write_shard(uri, f"captions-{number:05d}", TABLE)
    storage.write_bytes(f"{uri}/captions-00007.parquet", b"cut")
    with pytest.raises(DatasetError, match=r"captions-00007\.parquet is no whole Parquet file"):
        storage.write_manifest(uri, storage.Manifest(dataset="captions"))
    assert not storage.exists(f"{uri}/{storage.MANIFEST}")
