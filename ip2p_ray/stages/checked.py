"""Rows of own pairs, each looked at once: decoded, checked, judged where that is asked for.

What is found is a dataset without pictures. A killed run goes on after the last shard of it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.layouts import Given
from ip2p_ray.own_pairs import OwnPairsConfig, Pictures, check, fitted
from ip2p_ray.report import duration
from ip2p_ray.schema import SCORES, SIMILARITIES
from ip2p_ray.stages import run
from ip2p_ray.stages.progress import HEARTBEAT_S
from ip2p_ray.stages.shards import TableShards

if TYPE_CHECKING:  # it loads slowly, and most runs have no judge
    from ip2p_ray.clip import Clip

logger = logging.getLogger(__name__)

CHECKED = pa.schema(
    [
        ("place", pa.string()),  # where the row came from
        ("reason", pa.string()),  # why it is no pair; null when it is one
        ("detail", pa.string()),
        ("group", pa.string()),  # equal for rows that are to be in one split; may be null
        ("source_digest", pa.string()),  # pixel_digest() of the picture as it came
        ("edited_digest", pa.string()),
        ("width", pa.int32()),  # in pixels, as it came
        ("height", pa.int32()),
        *(SCORES.field(name) for name in SCORES.names if name not in ("split", "reason")),
    ]
)
"""One row for each row that came, in the same order; of a reject only what was found before."""

CHECKED_ROWS = 1000
"""Rows of a shard, and so what a kill makes check again."""

CHUNK = 16
"""Rows whose pictures are in memory at a time."""


def check_rows(
    files: Iterable[Given],
    uri: str,
    config: OwnPairsConfig,
    judge: Clip | None,
    *,
    shard_rows: int = CHECKED_ROWS,
) -> None:
    """Writes CHECKED at `uri`, from the row on that no shard holds yet.

    `judge` computes the similarities that a row's captions allow, of the pictures as they will be
    stored.
    """
    began = told = time.monotonic()
    there = storage.list_shards(uri)
    done = sum(storage.row_counts(there))
    shards = TableShards(uri, "checked", CHECKED, rows=shard_rows, first=len(there))
    rows = itertools.islice(files, done, None)
    with ThreadPoolExecutor(run.usable_cores()) as pool:
        for chunk in in_chunks(rows):
            found = list(pool.map(lambda given: _checked(given, config, judge), chunk))
            if judge is not None:
                _judge(judge, found)
            shards.add_rows([row for row, _ in found])
            done += len(chunk)
            if time.monotonic() - told > HEARTBEAT_S:
                told = time.monotonic()
                logger.info("checked: %s rows, %s so far", f"{done:,}", duration(told - began))
    shards.close()


def _checked(
    given: Given, config: OwnPairsConfig, judge: Clip | None
) -> tuple[dict[str, Any], Pictures | None]:
    row, pictures = check(given, config)
    row = {**dict.fromkeys(CHECKED.names), **row}
    if pictures is None or judge is None:
        return row, None  # without a judge they would pile up for nothing
    source, edited = pictures
    return row, (fitted(source, config), fitted(edited, config))


def _judge(judge: Clip, found: Sequence[tuple[dict[str, Any], Pictures | None]]) -> None:
    """Puts into each row the similarities that its captions allow, pictures of a size together."""
    sized: dict[tuple[int, int], list[tuple[dict[str, Any], Pictures]]] = {}
    for row, pictures in found:
        if pictures is not None:
            sized.setdefault(pictures[0].size, []).append((row, pictures))
    for same in sized.values():
        source, edited = (
            np.stack([np.asarray(pictures[place]) for _, pictures in same]) for place in (0, 1)
        )
        captions, edited_captions = (
            [row[name] or "" for row, _ in same] for name in ("caption", "edited_caption")
        )
        scores = judge.similarities(source, edited, captions, edited_captions).rows()
        for (row, _), values in zip(same, scores, strict=True):
            absent = {
                "caption_similarity": row["caption"] is None,
                "edited_caption_similarity": row["edited_caption"] is None,
                "image_similarity": False,
                "direction_similarity": None in (row["caption"], row["edited_caption"]),
            }
            row.update({name: None if absent[name] else values[name] for name in SIMILARITIES})


def in_chunks(rows: Iterable[Any], size: int = CHUNK) -> Iterator[list[Any]]:
    """The rows, so many at a time."""
    iterator = iter(rows)
    while part := list(itertools.islice(iterator, size)):
        yield part
