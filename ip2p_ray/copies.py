"""Copies on this machine of what lies in buckets: made once, whole, shared by its processes.

    <cache>/folders/<name>-<digest>/              a model, or another folder of files
    <cache>/files/<digest>/<name>                 a single object
    <cache>/datasets/<name>-<recipe>-<digest>/    shards, and what is mapped of them

<digest> is that of what the bucket says of the objects, so what has changed there is copied anew.
A copy gets its name when it is whole: what a kill cut is never read. The cache may be deleted
whenever nothing runs; the bucket has everything.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from ip2p_ray import objects, storage
from ip2p_ray.atomic import atomic_file, atomic_folder, one_at_a_time
from ip2p_ray.errors import ConfigError, DatasetError, StorageError
from ip2p_ray.report import size

logger = logging.getLogger(__name__)

CACHE = "IP2P_CACHE"
"""Environment variable, of each node, that names the cache where no flag does."""


def cache_folder(given: str | Path | None = None) -> Path:
    """The cache: what is given, else what CACHE names, else a temporary folder of this user's own.

    Raises:
        ConfigError: it cannot be made, or the temporary one is somebody else's.
    """
    named = given or os.environ.get(CACHE)
    usual = Path(tempfile.gettempdir()) / f"ip2p-{os.getuid()}"
    folder = Path(named) if named else usual
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = folder.stat().st_uid == os.getuid()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{folder} cannot be a cache ({reason}); set {CACHE}") from error
    if folder == usual and not own:
        raise ConfigError(f"{folder} is another user's; set {CACHE} to a folder of your own")
    return folder.absolute()


def local_folder(source: str | Path, cache: str | Path | None = None) -> str:
    """The folder below s3://... as one on this machine; what lies in no bucket is returned.

    So a path, a hub id and the name of a model stay, and file:///... becomes a path.

    Raises:
        DatasetError: nothing lies there.
        StorageError: object storage refuses, the disk is too small, or it changed meanwhile.
    """
    if storage.is_local(source):
        return str(storage.local_path(source)) if "://" in str(source) else str(source)
    uri = storage.absolute(source)
    found = list(objects.listing(uri))
    if not found:
        raise DatasetError(f"nothing lies below {uri}")
    name = uri.rpartition("/")[2]
    target = cache_folder(cache) / "folders" / f"{name}-{_digest(map(repr, found))}"
    with one_at_a_time(target.with_name(f"{target.name}.lock")):
        if target.is_dir():
            return str(target)
        _require_room(uri, sum(item.bytes for item in found), target)
        with atomic_folder(target) as new:
            storage.download(uri, new)
            if list(objects.listing(uri)) != found:
                raise StorageError(f"{uri} changed while it was copied; run the same command again")
    return str(target)


def local_file(uri: str, cache: str | Path | None = None) -> str:
    """The object at s3://... as a file on this machine, of the same name.

    Raises:
        DatasetError: there is none.
        StorageError: object storage refuses, the disk is too small, or it changed meanwhile.
    """
    tag, length = objects.tag(uri), objects.size(uri)
    if tag is None or length is None:
        raise DatasetError(f"there is no {uri}")
    target = cache_folder(cache) / "files" / _digest([uri, tag]) / uri.rpartition("/")[2]
    with one_at_a_time(target.parent.with_name(f"{target.parent.name}.lock")):
        if target.is_file():
            return str(target)
        _require_room(uri, length, target)
        with atomic_file(target) as new:
            objects.read_file(uri, new)
            if objects.tag(uri) != tag:
                raise StorageError(f"{uri} changed while it was copied; run the same command again")
    return str(target)


def local_dataset(uri: str, cache: str | Path | None = None) -> str:
    """The folder of a whole dataset's shards on this machine: its own, or that of their copies.

    A shard that is there is not copied again, whoever was killed while others were copied.

    Raises:
        DatasetError: the dataset is not whole.
        StorageError: object storage refuses, or the disk is too small.
    """
    if storage.is_local(uri):
        return str(storage.local_path(uri))
    manifest = storage.require_manifest(uri)
    assert manifest is not None
    folder = _dataset_folder(uri, manifest, cache)
    with one_at_a_time(folder.with_name(f"{folder.name}.lock")):
        missing = _missing(folder, manifest)
        if missing:
            _require_room(uri, _room(manifest, missing), folder)
        for shard in missing:
            with atomic_file(folder / shard.name) as new:
                objects.read_file(storage.join(uri, shard.name), new)
                if new.stat().st_size != shard.bytes:
                    raise StorageError(f"{storage.join(uri, shard.name)} changed; make it again")
    return str(folder)


def room_for_dataset(uri: str, cache: str | Path | None = None) -> tuple[int, int, str]:
    """Bytes that a copy of a dataset, and what is mapped of it, will take here; free ones; where.

    None are needed where it is copied already, or lies in no bucket.
    """
    folder = cache_folder(cache)
    free = shutil.disk_usage(folder).free
    if storage.is_local(uri):
        return 0, free, str(folder)
    manifest = storage.read_manifest(uri)
    missing = _missing(_dataset_folder(uri, manifest, cache), manifest)
    return _room(manifest, missing), free, str(folder)


def _dataset_folder(uri: str, manifest: storage.Manifest, cache: str | Path | None) -> Path:
    shards = [repr((shard.name, shard.bytes)) for shard in manifest.shards]
    name = f"{manifest.dataset}-{manifest.recipe[:16]}-{_digest([storage.absolute(uri), *shards])}"
    return cache_folder(cache) / "datasets" / name.replace("/", "-")


def _missing(folder: Path, manifest: storage.Manifest) -> list[storage.Shard]:
    def there(shard: storage.Shard) -> bool:
        path = folder / shard.name
        return path.is_file() and path.stat().st_size == shard.bytes

    return [shard for shard in manifest.shards if not there(shard)]


def _room(manifest: storage.Manifest, missing: list[storage.Shard]) -> int:
    """Parquet cannot be mapped: as much again is taken by what is made of all shards."""
    mapped = sum(shard.bytes for shard in manifest.shards) if missing else 0
    return sum(shard.bytes for shard in missing) + mapped


def _require_room(uri: str, need: int, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    logger.info("%s is copied to %s: %s of %s free", uri, folder, size(need), size(free))
    if need > free:
        raise StorageError(
            f"{uri} needs {size(need)} in {folder.parent}, {size(free)} are free: set {CACHE} to a "
            "folder on a larger disk"
        )


def _digest(parts: Iterable[str]) -> str:
    return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
