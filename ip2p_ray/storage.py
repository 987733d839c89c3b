"""Datasets as URIs of Parquet shards, made whole by a manifest that is written last.

    <uri>/pairs-00000.parquet ...   its rows
    <uri>/_manifest.json            lists them; a dataset without it is still being made

What is written here appears by an atomic rename, complete or not at all. The shards of a plan of
Ray Data (`stages.plan`) are Ray's: each is written under its final name, so a kill may leave one
that is cut. Ray's notes name it, and the next run deletes it before it goes on; no manifest is
written while one is there, because `write_manifest` reads every shard's footer.

Only local folders now, as plain paths or file:// URIs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_ray import __version__
from ip2p_ray.atomic import atomic_file, remove_leftovers
from ip2p_ray.errors import ConfigError, DatasetError
from ip2p_ray.schema import SCHEMA_VERSION

MANIFEST = "_manifest.json"


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


def join(uri: str | Path, *names: str) -> str:
    """The URI of something below a URI."""
    return "/".join([str(uri).rstrip("/"), *names])


def write_bytes(uri: str | Path, data: bytes) -> None:
    """The file at the URI, atomically."""
    with atomic_file(local_path(uri)) as path:
        path.write_bytes(data)


def write_shard(uri: str | Path, name: str, table: pa.Table) -> None:
    """The table as the shard `<uri>/<name>.parquet`, atomically."""
    with atomic_file(local_path(uri) / f"{name}.parquet") as path:
        pq.write_table(table, path)


def list_shards(uri: str | Path) -> list[str]:
    """URIs of a dataset's Parquet files in order of their names, whole dataset or not."""
    folder = local_path(uri)
    return [join(uri, name) for name in _shard_names(folder)]


def write_manifest(uri: str | Path, manifest: Manifest) -> Manifest:
    """The manifest with the shards that lie there now; from here on the dataset is whole."""
    folder = local_path(uri)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    shards = [_shard(folder, name) for name in _shard_names(folder)]
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
    path = local_path(uri) / MANIFEST
    if not path.is_file():
        state = "is not whole: it has no manifest" if path.parent.is_dir() else "does not exist"
        raise DatasetError(
            f"dataset {uri} {state}; run the job that makes it (the same command again goes on "
            "where it stopped), or allow an incomplete dataset"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shards = [Shard(**shard) for shard in values.pop("shards")]
        manifest = Manifest(**values, shards=shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"manifest {path} cannot be read: {error}") from error
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
    folder = local_path(uri)
    if allow_incomplete and folder.is_dir() and not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(uri)
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
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


def _shard_names(folder: Path) -> list[str]:
    names = []
    for place, folders, files in os.walk(folder):  # it passes over what is gone meanwhile
        folders[:] = [name for name in folders if name[0] not in "._"]
        shards = [name for name in files if name[0] not in "._" and name.endswith(".parquet")]
        names += [(Path(place) / name).relative_to(folder).as_posix() for name in shards]
    return sorted(names)


def _shard(folder: Path, name: str) -> Shard:
    path = folder / name
    try:
        rows = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"shard {path} is no whole Parquet file: {error}") from error
    return Shard(name=name, rows=rows, bytes=path.stat().st_size)


def _read(uri: str, schema: pa.Schema) -> pa.Table:
    path = local_path(uri)
    try:
        return pq.ParquetFile(path).read(columns=schema.names).select(schema.names).cast(schema)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DatasetError(f"shard {uri} does not have the expected columns: {error}") from error
