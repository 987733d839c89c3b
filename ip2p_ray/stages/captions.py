"""captions: cleaned, each once, as a dataset; prompt files of others are triplets already.

One process reads and writes, a batch of rows at a time; no Ray has to run.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import pyarrow as pa

from ip2p_ray import files, storage
from ip2p_ray.captions import UNSAMPLED, CaptionConfig, CaptionFiles, collect, surely_fits
from ip2p_ray.errors import ConfigError, StageError
from ip2p_ray.report import Report
from ip2p_ray.schema import (
    CAPTIONS,
    COLLECTED_CAPTIONS,
    REJECTS,
    TRIPLETS,
    caption_key,
    split_of,
)
from ip2p_ray.stages import run
from ip2p_ray.stages.progress import HEARTBEAT_S
from ip2p_ray.triplets import published
from ip2p_ray.triplets.prompt import completion, completion_prompt
from ip2p_ray.triplets.published import TripletFiles
from ip2p_ray.triplets.reply import Triplet

logger = logging.getLogger(__name__)

SHARD_ROWS = 20_000
"""Rows of a shard; as many are in memory."""

Found = TypeVar("Found")


def collect_captions(
    captions: Sequence[str], uri: str, *, config: Mapping[str, Any]
) -> storage.Manifest:
    """The dataset of the captions; `config` says where they come from."""

    def build() -> list[Report]:
        began = time.monotonic()
        rows = list(collect([{"caption": caption} for caption in captions]))
        kept = [row for row, reason in rows if reason is None]
        storage.write_shard(uri, "captions-00000", pa.Table.from_pylist(kept, schema=CAPTIONS))
        reasons = [reason for _, reason in rows]
        return [Report.count("captions", reasons, time.monotonic() - began)]

    return run.make(uri, run.Origin(dataset="captions", config=config), build)


def collect_files(
    rows: CaptionFiles,
    folder: str,
    config: CaptionConfig,
    *,
    held_out: float = 0.05,
    fits: Callable[[str], bool] | None = None,
) -> storage.Manifest:
    """The dataset `<folder>/captions` of the files, with `<folder>/rejects/captions`.

    Of prompt files (the columns of `triplets.published`, and no other asked for) it is the dataset
    `<folder>/triplets`, with `<folder>/rejects/triplets`; `held_out` is then the share of triplets
    that no editor is trained on. What only was not sampled is counted and not among the rejects.
    `fits` says whether an encoder reads a whole text, by default OpenAI's CLIP.

    Raises:
        DatasetError: a file is missing or broken, or lacks a column; says which and what it has.
        ConfigError: prompt files are mixed with others.
        StageError: no row could be kept.
    """
    paths = files.files_of(rows.paths)
    inputs = sorted([path.name, files.size(path)] for path in paths)
    settings = {**asdict(config), "files": inputs}
    whole = fits or _fits
    if rows.column is None and _all_triplets(paths):
        settings["held_out"] = held_out
        heard = Heard(TripletFiles(paths=rows.paths), "triplets")
        return _make(
            "triplets",
            folder,
            settings,
            lambda: published.collect(heard, config, fits=whole),
            TRIPLETS,
            lambda triplet: _triplet_row(triplet, held_out),
            _triplet_reject,
        )
    names = {path.name: rows.columns(path) for path in paths}
    settings["columns"] = sorted(set(names.values()), key=str)
    heard = Heard(rows, "captions")
    return _make(
        "captions",
        folder,
        settings,
        lambda: collect(heard, config, fits=whole),
        COLLECTED_CAPTIONS,
        dict,
        lambda row: (row["caption_key"], row["caption"]),
    )


class Heard:
    """Rows that log now and then how many of them were read."""

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], stage: str, every_s: float = HEARTBEAT_S
    ) -> None:
        self._rows, self._stage, self._every_s = rows, stage, every_s
        self._pass = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        self._pass += 1
        told = time.monotonic()
        for count, row in enumerate(self._rows, start=1):
            yield row
            if count % 1000 == 0 and time.monotonic() - told > self._every_s:
                told = time.monotonic()
                logger.info("%s: %s rows, reading %d of 2", self._stage, f"{count:,}", self._pass)


def _make(
    dataset: str,
    folder: str,
    settings: Mapping[str, Any],
    find: Callable[[], Iterator[tuple[Found, str | None]]],
    schema: pa.Schema,
    row_of: Callable[[Found], dict[str, Any]],
    reject_of: Callable[[Found], tuple[str, str]],
) -> storage.Manifest:
    """The dataset and its rejects, from rows that are found with their reasons."""
    uri, rejects = storage.join(folder, dataset), storage.join(folder, "rejects", dataset)
    origin = run.Origin(dataset=dataset, config=settings)

    def build() -> list[Report]:
        began = time.monotonic()
        for shard in storage.list_shards(uri):  # of a run that was killed
            storage.remove(shard)
        storage.remove_all(rejects)
        kept, dropped = Shards(uri, dataset, schema), Shards(rejects, "rejects", REJECTS)
        counts = Counter[str | None]()
        for found, reason in find():
            counts[reason] += 1
            if reason is None:
                kept.add(row_of(found))
            elif reason != UNSAMPLED:
                key, detail = reject_of(found)
                dropped.add({"stage": dataset, "key": key, "reason": reason, "detail": detail})
        kept.close()
        report = Report.count(dataset, counts.elements(), time.monotonic() - began)
        if not report.rows_out:
            raise StageError(f"no row could be kept: {report.line()}")
        dropped.close()
        run.make(rejects, origin, list)
        return [report]

    return run.make(uri, origin, build)


class Shards:
    """Writes rows, told one by one, as shards of so many."""

    def __init__(
        self, uri: str, name: str, schema: pa.Schema, shard_rows: int = SHARD_ROWS
    ) -> None:
        self._uri, self._name, self._schema, self._shard_rows = uri, name, schema, shard_rows
        self._rows: list[dict[str, Any]] = []
        self._count = 0

    def add(self, row: dict[str, Any]) -> None:
        """One more row."""
        self._rows.append(row)
        if len(self._rows) == self._shard_rows:
            self._write()

    def close(self) -> None:
        """Writes what is left, and one shard without rows where there were none."""
        if self._rows or not self._count:
            self._write()

    def _write(self) -> None:
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        storage.write_shard(self._uri, f"{self._name}-{self._count:05d}", table)
        self._rows.clear()
        self._count += 1


def _all_triplets(paths: Sequence[files.File]) -> bool:
    found = {path: published.triplet_columns(files.columns(path)) is not None for path in paths}
    if len(set(found.values())) > 1:
        triplets = next(path for path, is_triplets in found.items() if is_triplets)
        captions = next(path for path, is_triplets in found.items() if not is_triplets)
        raise ConfigError(
            f"{triplets} holds triplets and {captions} does not: collect them apart, or name the "
            "caption's column to take only that of each"
        )
    return all(found.values())


def _triplet_row(triplet: Triplet, held_out: float) -> dict[str, Any]:
    key = triplet.key
    return {
        "triplet_key": key,
        **vars(triplet),
        "caption_key": caption_key(triplet.caption),
        "split": split_of(key, held_out),
        "writer": "published",
    }


def _triplet_reject(triplet: Triplet) -> tuple[str, str]:
    written = completion(triplet.instruction, triplet.edited_caption)
    return triplet.key, completion_prompt(triplet.caption) + written


def _fits(text: str) -> bool:
    """Whether OpenAI's CLIP reads the whole text; its vocabulary is loaded once one is long."""
    if surely_fits(text):
        return True
    from ip2p_ray.clip import openai_fits

    return openai_fits(text)
