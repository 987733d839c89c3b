"""triplets -> queue: those that can be used, each once, in parts that one plan can hold."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.distinct import KEPT, NOT_SAMPLED, Distinct
from ip2p_ray.errors import DatasetError, StageError
from ip2p_ray.report import Report
from ip2p_ray.schema import REJECTS, SPLITS, TRIPLETS, triplet_key
from ip2p_ray.stages import plan, run
from ip2p_ray.stages.captions import Shards
from ip2p_ray.stages.shards import clear

PART_TRIPLETS = 16_384
"""Triplets of a part."""

NO_TEXT, WRONG_KEY, DUPLICATE, NOT_DRAWN = "no_text", "wrong_key", "duplicate", "not_drawn"
UNKNOWN_SPLIT = "unknown_split"

_TEXTS = ("caption", "instruction", "edited_caption")
_REASONS = (None, NO_TEXT, WRONG_KEY, UNKNOWN_SPLIT, DUPLICATE, NOT_DRAWN)
_CODES = {reason: code for code, reason in enumerate(_REASONS)}

Codes = npt.NDArray[np.uint8]
"""Of each row the place of its reason in _REASONS: there may be many millions."""


def fill_queue(
    triplets: str,
    folder: str,
    *,
    limit: int | None = None,
    max_reject_share: float = 1.0,
    part_triplets: int = PART_TRIPLETS,
) -> storage.Manifest:
    """The dataset `<folder>/queue`, TRIPLETS, and `<folder>/rejects/queue`.

    A triplet is dropped that lacks a text, whose key is not that of its texts, whose split is
    unknown, or that was there before. Of the others `limit` are drawn, always the same ones, and
    those of a smaller limit are among those of a larger. Each part is in the order of the keys.

    Raises:
        DatasetError: the triplets are not whole, or lack a column.
        StageError: more than `max_reject_share` of the triplets are unusable, or all; says why.
    """
    queue, rejects = storage.join(folder, "queue"), storage.join(folder, "rejects", "queue")
    origin = run.Origin(
        dataset="queue",
        config={"limit": limit, "part_triplets": part_triplets},
        sources={"triplets": storage.read_manifest(triplets).recipe},
    )

    def fill() -> list[Report]:
        began = time.monotonic()
        codes = _judged(triplets, limit)
        report = Report.count("queue", _reasons(codes), time.monotonic() - began)
        _judge(report, triplets, max_reject_share, rejects)
        _write(triplets, codes, queue, part_triplets)
        return [report]

    def reject() -> list[Report]:
        _write_rejects(triplets, _judged(triplets, limit), rejects)
        return []

    run.make(rejects, replace(origin, dataset="rejects/queue"), reject)
    return run.make(queue, origin, fill)


def _rows(triplets: str) -> Iterator[dict[str, Any]]:
    for shard in plan.shards(triplets):
        try:
            with storage.open_parquet(shard) as file:
                missing = set(TRIPLETS.names) - set(file.schema_arrow.names)
                if missing:
                    raise DatasetError(
                        f"shard {shard} holds no triplets: it lacks {', '.join(sorted(missing))}; "
                        "jobs/collect_captions.py makes triplets of prompt files"
                    )
                for name in TRIPLETS.names:
                    kind = file.schema_arrow.field(name).type
                    if not _is_text(kind):
                        raise DatasetError(
                            f"shard {shard} holds no triplets: its column {name} is {kind}"
                        )
                for batch in file.iter_batches(4096, columns=TRIPLETS.names):
                    yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"shard {shard} cannot be read: {error}") from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _judged(triplets: str, limit: int | None) -> Codes:
    """Why each row, in the order in which they lie there, is dropped."""
    distinct, codes = Distinct(), bytearray()
    for row in _rows(triplets):
        reason = _fault(row)
        codes.append(_CODES[reason])
        if reason is None:
            distinct.add(row["triplet_key"])
    found = np.frombuffer(codes, np.uint8)
    verdicts = distinct.verdicts(sample=limit)
    told = np.full(len(verdicts), _CODES[DUPLICATE], np.uint8)
    told[verdicts == KEPT] = _CODES[None]
    told[verdicts == NOT_SAMPLED] = _CODES[NOT_DRAWN]
    found[found == _CODES[None]] = told
    return found


def _reasons(codes: Codes) -> Iterator[str | None]:
    return (_REASONS[code] for code in codes)


def _fault(row: dict[str, Any]) -> str | None:
    texts = [row[name] for name in _TEXTS]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return NO_TEXT
    if row["triplet_key"] != triplet_key(*texts):
        return WRONG_KEY
    return None if row["split"] in SPLITS else UNKNOWN_SPLIT


def _judge(report: Report, triplets: str, max_reject_share: float, rejects: str) -> None:
    """Returns if enough triplets can be used."""
    counts = Counter(report.rejected)
    drawn = report.rows_in - counts.pop(NOT_DRAWN, 0)
    bad = sum(counts.values())
    told = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    if not report.rows_out:
        raise StageError(f"queue: none of {drawn:,} triplets of {triplets} can be used: {told}")
    if bad > max_reject_share * drawn:
        raise StageError(
            f"queue: {bad:,} of {drawn:,} triplets of {triplets} cannot be used, more than the "
            f"{max_reject_share:.0%} allowed: {told}; which, is in {rejects}; mend them, or raise "
            "--max-reject-share"
        )


def _write(triplets: str, codes: Codes, queue: str, part_triplets: int) -> None:
    clear(queue)
    part: list[dict[str, Any]] = []
    number = 0
    left = int(np.count_nonzero(codes == _CODES[None]))
    for row, reason in zip(_rows(triplets), _reasons(codes), strict=True):
        if reason is not None:
            continue
        part.append(row)
        left -= 1
        if len(part) == part_triplets or not left:
            table = pa.Table.from_pylist(part, schema=TRIPLETS).sort_by("triplet_key")
            storage.write_shard(queue, f"part-{number:05d}", table)
            part, number = [], number + 1


def _write_rejects(triplets: str, codes: Codes, rejects: str) -> None:
    clear(rejects)
    shards = Shards(rejects, "rejects", REJECTS)
    for row, reason in zip(_rows(triplets), _reasons(codes), strict=True):
        if reason in (None, NOT_DRAWN):
            continue
        texts = " | ".join(str(row[name]) for name in _TEXTS)
        key = row["triplet_key"] or ""
        shards.add({"stage": "pairs", "key": key, "reason": reason, "detail": texts})
    shards.close()
