import os
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from ip2p_ray import copies, objects, storage
from ip2p_ray.copies import cache_folder, local_dataset, local_folder, room_for_dataset
from ip2p_ray.errors import ConfigError, DatasetError, StorageError
from ip2p_ray.presets import folder_fingerprint
from ip2p_ray.schema import CAPTIONS
from ip2p_ray.testing.buckets import FaultyWay, WayFaults


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a folder in it."""
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "weights").write_bytes(bytes(range(256)) * 100)
    return folder


def uploaded(folder: Path, uri: str) -> str:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        objects.write_file(f"{uri}/{path.relative_to(folder).as_posix()}", path)
    return uri


def dataset(uri: str, shards: int = 3) -> str:
    for number in range(shards):
        rows = [{"caption_key": f"{number}", "caption": "a" * 99, "url": None}]
        storage.write_shard(uri, f"c-{number}", pa.Table.from_pylist(rows, schema=CAPTIONS))
    storage.write_manifest(uri, storage.Manifest(dataset="captions", recipe="abc"))
    return uri


def test_what_lies_in_no_bucket_stays(tmp_path: Path) -> None:
    assert local_folder("org/model") == "org/model"
    assert local_folder(tmp_path) == str(tmp_path)
    assert local_folder(f"file://{tmp_path}/a%20b") == f"{tmp_path}/a b"
    uri = dataset(str(tmp_path / "captions"))
    assert local_dataset(uri) == uri
    assert room_for_dataset(uri)[0] == 0


def test_a_model_is_the_same_here_and_is_copied_once(bucket: str, model: Path, cache: Path) -> None:
    uri = uploaded(model, f"{bucket}/models/editor")
    found = Path(local_folder(uri, cache))
    assert folder_fingerprint(found) == folder_fingerprint(model)
    (found / "mark").touch()
    assert local_folder(f"{uri}/", cache) == str(found)
    assert (found / "mark").exists()
    objects.write(f"{uri}/model_index.json", b"[]")  # of the same length
    other = Path(local_folder(uri, cache))
    assert (other / "model_index.json").read_bytes() == b"[]"
    assert not (other / "mark").exists()


def test_many_at_once_share_one_copy(
    bucket: str, bucket_endpoint: str, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, found = uploaded(model, f"{bucket}/editor"), []
    with FaultyWay(bucket_endpoint) as way, monkeypatch.context() as other:
        other.setenv("AWS_ENDPOINT_URL", way.url)
        threads = [
            threading.Thread(target=lambda: found.append(local_folder(uri, cache)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        listings, objects_read = 4 + 2, 2
        assert way.counts["GET"] == listings + objects_read
    assert len(set(found)) == 1
    assert len(found) == 4


def test_what_a_kill_cut_is_not_used(bucket: str, model: Path, cache: Path) -> None:
    uri = uploaded(model, f"{bucket}/editor")
    child = os.fork()
    if not child:

        def end(_: str, path: Path) -> None:
            path.write_bytes(b"half")
            os._exit(9)

        objects.read_file = end  # in the child alone
        local_folder(uri, cache)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    halves = list(cache.rglob("model_index.json"))
    assert [half.read_bytes() for half in halves] == [b"half"]
    assert folder_fingerprint(Path(local_folder(uri, cache))) == folder_fingerprint(model)
    assert not halves[0].exists()


def test_faults_on_the_way_leave_the_same_copy_or_none(
    bucket: str, bucket_endpoint: str, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = uploaded(model, f"{bucket}/editor")
    faults = WayFaults(slow_down=0.1, hang_up=0.1, lost=0.1, cut=0.1)
    with FaultyWay(bucket_endpoint, faults) as way, monkeypatch.context() as other:
        other.setenv("AWS_ENDPOINT_URL", way.url)
        found = Path(local_folder(uri, cache))
    assert folder_fingerprint(found) == folder_fingerprint(model)


def test_nothing_there_is_told(bucket: str, cache: Path) -> None:
    with pytest.raises(DatasetError, match="nothing lies below"):
        local_folder(f"{bucket}/none", cache)
    with pytest.raises(DatasetError, match="does not exist"):
        local_dataset(f"{bucket}/none", cache)


def test_an_object_with_others_below_it_is_no_file(bucket: str, cache: Path) -> None:
    objects.write(f"{bucket}/folder/a", b"1")
    objects.write(f"{bucket}/folder/a/b", b"2")
    with pytest.raises(DatasetError, match=r"folder/a is an object, and others lie below it"):
        local_folder(f"{bucket}/folder", cache)


def test_shards_that_are_there_are_not_copied_again(bucket: str, cache: Path) -> None:
    uri = dataset(f"{bucket}/captions")
    shards = [shard.bytes for shard in storage.read_manifest(uri).shards]
    need, free, where = room_for_dataset(uri, cache)
    assert (need, where) == (2 * sum(shards), str(cache))
    assert free > 0
    folder = Path(local_dataset(uri, cache))
    assert sorted(path.name for path in folder.iterdir()) == [f"c-{n}.parquet" for n in range(3)]
    assert room_for_dataset(uri, cache)[0] == 0
    first, second, third = (folder / f"c-{number}.parquet" for number in range(3))
    before = first.stat().st_mtime_ns
    second.unlink()
    third.write_bytes(b"cut")
    assert local_dataset(uri, cache) == str(folder)
    assert first.stat().st_mtime_ns == before
    assert [path.stat().st_size for path in (first, second, third)] == shards


def test_a_dataset_that_was_made_again_is_copied_anew(bucket: str, cache: Path) -> None:
    first = local_dataset(dataset(f"{bucket}/captions"), cache)
    storage.remove_all(f"{bucket}/captions")
    assert local_dataset(dataset(f"{bucket}/captions", shards=2), cache) != first


def test_too_small_a_disk_is_told_before_anything_is_copied(
    bucket: str, cache: Path, tmp_path: Path
) -> None:
    uri = dataset(f"{bucket}/captions")
    manifest = storage.read_manifest(uri)
    shard = storage.Shard(name=manifest.shards[0].name, rows=1, bytes=1 << 60)
    with pytest.raises(
        StorageError, match=r"needs 1152921.5 TB in .*, .* are free: set IP2P_CACHE"
    ):
        copies._require_room(uri, shard.bytes, cache / "datasets" / "it")


def test_the_cache_is_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(copies.CACHE, str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be a cache"):
        cache_folder(tmp_path / "file")
