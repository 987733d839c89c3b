"""Datasets as URIs of Parquet shards, made whole by a manifest that is written last.

    <uri>/pairs-00000.parquet ...   its rows
    <uri>/_manifest.json            lists them; a dataset without it is still being made

What is written here appears by an atomic rename, complete or not at all. The shards of a plan of
Ray Data (`stages.plan`) are Ray's: each is written under its final name, so a kill may leave one
that is cut. Ray's notes name it, and the next run deletes it before it goes on; no manifest is
written while one is there, because `write_manifest` reads every shard's footer.

A URI is a plain path, file:///... or s3://bucket/... (`objects`), where a completed upload is what
the rename is here.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_ray import __version__, files, logs, object_files, objects, parquet, s3
from ip2p_ray.atomic import atomic_file, remove_folder, remove_leftovers
from ip2p_ray.errors import ConfigError, DatasetError, StorageError
from ip2p_ray.schema import SCHEMA_VERSION

logger = logging.getLogger(__name__)

MANIFEST = "_manifest.json"

_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file of a dataset."""

    name: str
    """Path below the dataset's URI."""
    rows: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a whole dataset."""

    dataset: str
    """Its name in `schema.DATASETS`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The algorithm config as a dictionary."""
    recipe: str = ""
    """`schema.recipe` of the config and the models."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Fingerprint of each model that made it, by role."""
    reports: Sequence[Mapping[str, Any]] = ()
    """`Report.as_dict` of each stage that made it: the survival funnel by reason."""
    wall_seconds: float = 0.0
    device_seconds: float = 0.0
    """Sum over devices of the time they were held."""
    schema_version: int = SCHEMA_VERSION
    code_version: str = __version__
    shards: Sequence[Shard] = ()
    """Filled by `write_manifest`."""

    @property
    def rows(self) -> int:
        """The number of rows of all shards."""
        return sum(shard.rows for shard in self.shards)


def is_local(uri: str | Path) -> bool:
    """Whether it names something on a file system."""
    return not s3.is_object(uri)


def local_path(uri: str | Path) -> Path:
    """The local path of a URI: a plain path or file:///...

    Raises:
        ConfigError: another scheme.
    """
    if isinstance(uri, Path):
        return uri
    parts = urlsplit(uri)
    if "://" not in uri:
        return Path(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ConfigError(f"{uri}: only local paths and file:/// URIs are supported")
    return Path(unquote(parts.path))


def absolute(uri: str | Path) -> str:
    """The URI as a process with another working directory names the same."""
    return str(uri).rstrip("/") if s3.is_object(uri) else str(local_path(uri).absolute())


def join(uri: str | Path, *names: str) -> str:
    """The URI of something below a URI."""
    return "/".join([str(uri).rstrip("/"), *names])


def check(uri: str | Path) -> None:
    """Returns if a bucket can be listed; of a local path nothing is asked.

    Raises:
        StorageError: no such bucket, no right to it, or nobody there; says which.
    """
    if s3.is_object(uri):
        objects.check(str(uri))


def exists(uri: str | Path) -> bool:
    """Whether a file, a folder or an object lies there."""
    if s3.is_object(uri):
        return objects.size(str(uri)) is not None
    return local_path(uri).exists()


def read_bytes(uri: str | Path) -> bytes:
    """What a file or an object holds.

    Raises:
        DatasetError, OSError: there is none.
        StorageError: object storage refuses.
    """
    return objects.read(str(uri)) if s3.is_object(uri) else local_path(uri).read_bytes()


def write_bytes(uri: str | Path, data: bytes) -> None:
    """The file at the URI, atomically."""
    if s3.is_object(uri):
        objects.write(str(uri), data)
        return
    with atomic_file(local_path(uri)) as path:
        path.write_bytes(data)


def remove(uri: str | Path) -> None:
    """Deletes a file or an object, if there is one."""
    if s3.is_object(uri):
        objects.remove([str(uri)])
    else:
        local_path(uri).unlink(missing_ok=True)


def remove_shards(uri: str | Path) -> None:
    """Deletes the Parquet files of a dataset, if there are any."""
    if s3.is_object(uri):
        objects.remove(list_shards(uri))
        return
    for shard in list_shards(uri):
        remove(shard)


def abort_uploads(uri: str | Path) -> None:
    """Forgets what killed processes were uploading below the URI; nobody else writes there now.

    Where that is not allowed they stay, unseen, until a rule of the bucket removes them.
    """
    if not s3.is_object(uri):
        return
    try:
        count = objects.abort_uploads(str(uri))
    except (StorageError, DatasetError) as error:  # some stores know no such listing
        logger.debug("uploads of killed processes stay: %s", error)
        return
    if count:
        logger.info("%s: %d uploads of a stopped process were cleared away", uri, count)


def remove_all(uri: str | Path) -> None:
    """Deletes a folder, or all objects below the URI, if there are any.

    A kill in between leaves no half of a folder, and of a dataset in a bucket no manifest.
    """
    if s3.is_object(uri):
        objects.remove([join(uri, MANIFEST)])
        objects.remove_below(str(uri))
    elif local_path(uri).is_dir():
        remove_folder(local_path(uri))


def download(uri: str, folder: str | Path) -> None:
    """Every object below s3://... as a file in the folder.

    Raises:
        DatasetError: nothing lies there, or a name would leave the folder, or is a folder's too.
        StorageError: object storage refuses, or cannot be reached.
    """
    names = [found.name for found in objects.listing(uri)]
    if not names:
        raise DatasetError(f"nothing lies below {uri}")
    folders = {str(above) for name in names for above in PurePosixPath(name).parents}
    for name in names:
        path = Path(folder) / name
        if ".." in path.parts or Path(name).is_absolute():
            raise DatasetError(f"{join(uri, name)} is no name for a file")
        if name in folders:
            raise DatasetError(
                f"{join(uri, name)} is an object, and others lie below it: no file is also a "
                "folder; rename it"
            )
    for name in names:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        objects.read_file(join(uri, name), path)


def upload(folder: str | Path, uri: str) -> None:
    """Every file of the folder, as an object below s3://...; each is whole when it is seen.

    Raises:
        StorageError: object storage refuses, or cannot be reached.
    """
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        objects.write_file(join(uri, path.relative_to(folder).as_posix()), path)


def opened(uri: str | Path) -> Any:
    """What `pyarrow.parquet` reads a file or an object from, by parts."""
    return object_files.opened(str(uri)) if s3.is_object(uri) else local_path(uri)


@contextmanager
def open_parquet(uri: str | Path) -> Iterator[pq.ParquetFile]:
    """A shard that is read by parts, of which few are in memory."""
    place = object_files.ObjectFile(str(uri)) if s3.is_object(uri) else local_path(uri)
    with logs.blamed(shard=Path(uri).name), files.open_parquet(place) as file:
        yield file


def read_table(uri: str | Path, **options: Any) -> pa.Table:
    """A shard as `ip2p_ray.parquet` reads it."""
    with logs.blamed(shard=Path(uri).name):
        return parquet.read_table(opened(uri), uri, **options)


def arrow_place(uri: str | Path) -> tuple[Any, str]:
    """Arrow's file system for a URI, None for local ones, and the path in it."""
    if s3.is_object(uri):
        return s3.filesystem(str(uri))
    return None, str(local_path(uri))


def files_at(uri: str | Path) -> list[files.File]:
    """What `files` reads: a local path; of s3://..., the object, or the data files below it.

    Raises:
        DatasetError: there is no such object, and none of a known kind below.
        StorageError: object storage refuses.
    """
    if not s3.is_object(uri):
        return [local_path(uri)]
    check(uri)
    place = str(uri)
    if objects.size(place) is not None:
        return [object_files.ObjectFile(place)]
    names = [found.name for found in objects.listing(place) if files.is_data(found.name.split("/"))]
    if not names:
        raise DatasetError(f"there is no {uri}, and no {', '.join(files.KINDS)} below it")
    above = place.rstrip("/").rpartition("/")[2]
    return [object_files.ObjectFile(join(place, name), f"{above}/{name}") for name in names]


def write_shard(uri: str | Path, name: str, table: pa.Table) -> None:
    """The table as the shard `<uri>/<name>.parquet`, atomically."""
    with logs.about(shard=f"{name}.parquet"):
        _write_shard(uri, name, table)
        logger.debug("%d rows are written", table.num_rows)


def _write_shard(uri: str | Path, name: str, table: pa.Table) -> None:
    if s3.is_object(uri):
        whole = pa.BufferOutputStream()
        pq.write_table(table, whole)
        objects.write(join(uri, f"{name}.parquet"), whole.getvalue().to_pybytes())
        return
    with atomic_file(local_path(uri) / f"{name}.parquet") as path:
        pq.write_table(table, path)


def list_shards(uri: str | Path) -> list[str]:
    """URIs of a dataset's Parquet files in order of their names, whole dataset or not."""
    return [join(uri, name) for name in sorted(_shard_sizes(uri))]


def write_manifest(uri: str | Path, manifest: Manifest) -> Manifest:
    """The manifest with the shards that lie there now; from here on the dataset is whole."""
    if not s3.is_object(uri):
        folder = local_path(uri)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    sizes = _shard_sizes(uri)
    names = sorted(sizes)
    counts = row_counts([join(uri, name) for name in names])
    shards = [
        Shard(name=name, rows=rows, bytes=sizes[name])
        for name, rows in zip(names, counts, strict=True)
    ]
    values = {**vars(manifest), "shards": shards}
    whole = Manifest(**values)
    text = json.dumps(asdict(whole), indent=2, sort_keys=True, allow_nan=False)
    write_bytes(join(uri, MANIFEST), (text + "\n").encode())
    return whole


def read_manifest(uri: str | Path) -> Manifest:
    """The manifest of a whole dataset.

    Raises:
        DatasetError: there is none, it cannot be read, or it has another schema version.
    """
    place = join(uri, MANIFEST)
    if not exists(place):
        state = "is not whole: it has no manifest" if any_there(uri) else "does not exist"
        raise DatasetError(
            f"dataset {uri} {state}; run the job that makes it (the same command again goes on "
            "where it stopped), or allow an incomplete dataset"
        )
    try:
        values = json.loads(read_bytes(place))
        shards = [Shard(**shard) for shard in values.pop("shards")]
        manifest = Manifest(**values, shards=shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"manifest {place} cannot be read: {error}") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise DatasetError(
            f"dataset {uri} has schema version {manifest.schema_version}, this code reads "
            f"{SCHEMA_VERSION}; make the dataset again"
        )
    return manifest


def require_manifest(uri: str | Path, *, allow_incomplete: bool = False) -> Manifest | None:
    """The manifest, after a check that every shard it lists lies there in its full length.

    With `allow_incomplete` None where there is no manifest.

    Raises:
        DatasetError: no manifest, or a shard is missing or of another length.
    """
    if allow_incomplete and any_there(uri) and not exists(join(uri, MANIFEST)):
        return None
    manifest = read_manifest(uri)
    sizes = _shard_sizes(uri)
    for shard in manifest.shards:
        if sizes.get(shard.name) != shard.bytes:
            raise DatasetError(
                f"dataset {uri}: shard {shard.name} is missing or changed since the manifest was "
                "written; make the dataset again"
            )
    return manifest


def read_dataset(
    uri: str | Path,
    schema: pa.Schema,
    *,
    columns: Sequence[str] | None = None,
    allow_incomplete: bool = False,
) -> pa.Table:
    """All rows of a dataset, shard by shard, with the schema's columns (or only `columns`).

    Raises:
        DatasetError: not whole (unless allowed), or a shard lacks a column or has another type.
    """
    manifest = require_manifest(uri, allow_incomplete=allow_incomplete)
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    shards = (
        list_shards(uri)
        if manifest is None
        else [join(uri, shard.name) for shard in manifest.shards]
    )
    return pa.concat_tables([schema.empty_table(), *(_read(shard, schema) for shard in shards)])


def count_rows(shard: str | Path) -> int:
    """The rows of a shard, from its footer.

    Raises:
        DatasetError: it is no whole Parquet file, or has a column of an extension type.
    """
    with logs.blamed(shard=Path(shard).name):
        try:
            with parquet.opened(opened(shard), shard) as file:
                return int(file.metadata.num_rows)
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"shard {shard} is no whole Parquet file: {error}") from error


def row_counts(shards: Sequence[str | Path]) -> list[int]:
    """The rows of each shard; the footers of objects are read several at a time.

    Raises:
        DatasetError: one is no whole Parquet file.
    """
    if all(map(is_local, shards)):
        return [count_rows(shard) for shard in shards]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return list(pool.map(count_rows, shards))


def any_there(uri: str | Path) -> bool:
    """Whether anything lies at or below the URI."""
    if s3.is_object(uri):
        return next(objects.listing(str(uri)), None) is not None
    return local_path(uri).is_dir()


def names(uri: str | Path) -> Iterator[str]:
    """Of what lies in a folder, in their order; of a folder in a bucket again with each object."""
    if s3.is_object(uri):
        yield from (found.name.partition("/")[0] for found in objects.listing(str(uri)))
    elif local_path(uri).is_dir():
        yield from sorted(path.name for path in local_path(uri).iterdir())


def folders(uri: str | Path) -> list[str]:
    """Names of the folders in a folder, in their order, but for hidden ones."""
    if s3.is_object(uri):
        inside = list(objects.folders(str(uri)))
    else:
        _, inside, _ = next(os.walk(local_path(uri)), ("", [], []))
    return sorted(name for name in inside if name and not name.startswith("."))


def _shard_sizes(uri: str | Path) -> dict[str, int]:
    """The bytes of each shard, by its path below the URI."""
    if s3.is_object(uri):
        return {
            found.name: found.bytes
            for found in objects.listing(str(uri))
            if _is_shard(found.name.split("/"))
        }
    folder, sizes = local_path(uri), {}
    for place, folders, inside in os.walk(folder):  # it passes over what is gone meanwhile
        folders[:] = [name for name in folders if name[0] not in "._"]
        for path in (Path(place) / name for name in inside if _is_shard([name])):
            with suppress(FileNotFoundError):
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return sizes


def _is_shard(parts: Sequence[str]) -> bool:
    return parts[-1].endswith(".parquet") and not any(part[:1] in ("", ".", "_") for part in parts)


def _read(uri: str, schema: pa.Schema) -> pa.Table:
    with logs.blamed(shard=Path(uri).name):
        try:
            with parquet.opened(opened(uri), uri) as file:
                return file.read(columns=schema.names).select(schema.names).cast(schema)
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise DatasetError(
                f"shard {uri} does not have the expected columns: {error}"
            ) from error
