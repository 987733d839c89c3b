"""Stored scores judged again: pairs by other thresholds, without a model and without a GPU.

Every candidate's similarities were kept, but pictures only of the pairs: a candidate that is among
the best by the new rules and was not by the old ones has none. It is a reject with a reason of its
own, and the next best that has pictures is kept in its place. No Ray has to run; a few tables are
in memory at a time.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ip2p_ray import storage
from ip2p_ray.errors import DatasetError, StageError
from ip2p_ray.filtering import NOT_BEST, select
from ip2p_ray.report import Report
from ip2p_ray.rules import NO_PICTURE, Rules, nothing_kept, reject_row
from ip2p_ray.schema import PAIRS, REJECTS, SCORES, SIMILARITIES, SPLITS
from ip2p_ray.stages import run
from ip2p_ray.stages.shards import PICTURE_ROWS, TableShards, clear, read_tables, require_free

logger = logging.getLogger(__name__)

_ROWS = 20_000
_JUDGED = ("triplet_key", "pair_key", "index", *SIMILARITIES, "reason")


def stored_rules(folder: str) -> Rules | None:
    """The rules that pairs and scores in the folder were made with, None if that is not known."""
    for name in ("scores", "pairs", "candidates"):
        uri = storage.join(folder, name)
        if not storage.exists(storage.join(uri, storage.MANIFEST)):
            continue
        rules = Rules.of(storage.read_manifest(uri).config)
        if rules is not None:
            return rules
    return None


def rejudge_pairs(scored: str, folder: str, rules: Rules) -> storage.Manifest:
    """The dataset `<folder>/pairs` of the scores and pairs in `scored`, judged by other rules.

    Beside it are `<folder>/scores`, all of them with their new reasons, and
    `<folder>/rejects/pairs`; what was rejected for other reasons than a score stays so. Keys and
    pictures are the same.

    Raises:
        DatasetError: scores or pairs are missing, not whole, or not of this package.
        ConfigError: something else lies in the folder.
        StageError: no candidate was accepted; the text says which threshold rejected how many.
            Nothing was written then, so that other rules may be tried in the same folder.
    """
    again = _Again(scored, rules)
    sources = {
        name: storage.read_manifest(storage.join(scored, name)).recipe
        for name in ("scores", "pairs")
    }
    scores, pairs = storage.join(folder, "scores"), storage.join(folder, "pairs")
    rejects = storage.join(folder, "rejects", "pairs")
    for uri in (scores, rejects, pairs):
        require_free(uri)
    models = storage.read_manifest(storage.join(scored, "pairs")).models

    def make(dataset: str, uri: str, build: Any) -> storage.Manifest:
        origin = run.Origin(dataset=dataset, config=asdict(rules), models=models, sources=sources)
        return run.make(uri, origin, build)

    if not storage.exists(storage.join(pairs, storage.MANIFEST)):
        again.require_some()
    make("scores", scores, lambda: again.write_scores(scores))
    make("rejects", rejects, lambda: again.write_rejects(rejects))
    return make("pairs", pairs, lambda: again.write_pairs(pairs))


class _Again:
    """One reading of old scores by new rules; what is asked for twice is kept."""

    def __init__(self, scored: str, rules: Rules) -> None:
        self._scores, self._pairs = storage.join(scored, "scores"), storage.join(scored, "pairs")
        self._rejects = storage.join(scored, "rejects", "pairs")
        self._rules = rules

    def require_some(self) -> None:
        """Fails where no candidate is accepted."""
        accepted, counts = self._accepted
        if not accepted:
            raise StageError(nothing_kept(counts, self._rules, self._scores))

    def write_scores(self, uri: str) -> list[Report]:
        clear(uri)
        shards = TableShards(uri, "scores", SCORES)
        for table in self._judged():
            shards.add(table)
        shards.close()
        return []

    def write_rejects(self, uri: str) -> list[Report]:
        clear(uri)
        shards = TableShards(uri, "rejects", REJECTS)
        unscored = set()
        for table in self._judged():
            dropped = table.filter(pc.is_valid(table["reason"]))
            rows = dropped.select(["pair_key", "reason", *SIMILARITIES]).to_pylist()
            shards.add_rows([reject_row(row) for row in rows])
            unscored |= {row["pair_key"] for row in rows if row["image_similarity"] is None}
        for table in self._others():
            fresh = [key not in unscored for key in table["key"].to_pylist()]
            shards.add(table.filter(pa.array(fresh, pa.bool_())))
        shards.close()
        return []

    def write_pairs(self, uri: str) -> list[Report]:
        began = time.monotonic()
        clear(uri)
        accepted, counts = self._accepted
        shards = {split: TableShards(uri, split, PAIRS) for split in SPLITS}
        for table in read_tables(self._pairs, PAIRS, rows=PICTURE_ROWS):
            kept = [bytes.fromhex(key) in accepted for key in table["pair_key"].to_pylist()]
            table = table.filter(pa.array(kept, pa.bool_()))
            for split, own in shards.items():
                own.add(table.filter(pc.equal(table["split"], split)))
        for own in shards.values():
            own.close()
        written = sum(own.rows for own in shards.values())
        if written != len(accepted):
            raise DatasetError(
                f"dataset {self._pairs} holds {written:,} of {len(accepted):,} accepted pairs once "
                "and in a known split; make it again"
            )
        self._tell(counts)
        return [Report.count("pairs", counts.elements(), time.monotonic() - began)]

    def _tell(self, counts: Mapping[str | None, int]) -> None:
        missing = counts.get(NO_PICTURE, 0)
        if missing:
            logger.info(
                "pairs: %s candidates that are among the best by these rules have no pictures, "
                "which were kept only for the pairs of %s; to have those, generate pairs by these "
                "rules into a new folder",
                f"{missing:,}",
                self._pairs,
            )

    @cached_property
    def _accepted(self) -> tuple[set[bytes], Counter[str | None]]:
        """The keys of the accepted candidates, and how many there are of each reason."""
        accepted, counts = set(), Counter[str | None]()
        unscored = set()
        for table in self._judged():
            keys, reasons = table["pair_key"].to_pylist(), table["reason"].to_pylist()
            counts.update(reasons)
            accepted |= {
                bytes.fromhex(key)
                for key, reason in zip(keys, reasons, strict=True)
                if reason is None
            }
            unscored |= set(
                table.filter(pc.is_null(table["image_similarity"]))["pair_key"].to_pylist()
            )
        for table in self._others():
            rows = table.select(["key", "reason"]).to_pylist()
            counts.update(row["reason"] for row in rows if row["key"] not in unscored)
        return accepted, counts

    @cached_property
    def _pictured(self) -> set[bytes]:
        """The keys of all pairs that have pictures."""
        return {
            bytes.fromhex(key)
            for table in read_tables(self._pairs, PAIRS, rows=_ROWS, columns=["pair_key"])
            for key in table["pair_key"].to_pylist()
        }

    def _judged(self) -> Iterator[pa.Table]:
        """Tables of SCORES, each of whole triplets, with the new reasons."""
        for table in whole_triplets(read_tables(self._scores, SCORES, rows=_ROWS), self._scores):
            rows = table.select(_JUDGED).to_pylist()
            reasons: list[str | None] = []
            for _, same in groupby(rows, key=lambda row: row["triplet_key"]):
                reasons += self._reasons(list(same))
            place = SCORES.get_field_index("reason")
            yield table.set_column(place, SCORES.field("reason"), pa.array(reasons, pa.string()))

    def _reasons(self, rows: list[dict[str, Any]]) -> list[str | None]:
        """Of the candidates of one triplet. One that was never scored keeps the reason it has."""
        thresholds = self._rules.thresholds
        reasons = [row["reason"] for row in rows]
        scored = [place for place, row in enumerate(rows) if row["image_similarity"] is not None]
        pictured = [p for p in scored if bytes.fromhex(rows[p]["pair_key"]) in self._pictured]

        def chosen(places: list[int]) -> Iterator[tuple[int, str | None]]:
            found = select([rows[place] for place in places], thresholds, self._rules.keep)
            return zip(places, found, strict=True)

        for place, reason in chosen(scored):
            reasons[place] = reason or NO_PICTURE
        for place, reason in chosen(pictured):  # one without pictures takes no place from these
            reasons[place] = reason
        return reasons

    def _others(self) -> Iterator[pa.Table]:
        """Rejects that no threshold has to do with."""
        if not storage.exists(storage.join(self._rejects, storage.MANIFEST)):
            return
        by_score = pa.array([*SIMILARITIES, NOT_BEST, NO_PICTURE])
        for table in read_tables(self._rejects, REJECTS, rows=_ROWS):
            yield table.filter(pc.invert(pc.is_in(table["reason"], by_score)))


def whole_triplets(tables: Iterator[pa.Table], uri: str) -> Iterator[pa.Table]:
    """The rows of the tables, none of which then ends within a triplet.

    Raises:
        DatasetError: the rows of a triplet are not side by side.
    """
    seen: set[bytes] = set()
    left: pa.Table | None = None
    for table in tables:
        table = table if left is None else pa.concat_tables([left, table])
        keys = table["triplet_key"].to_pylist()
        whole = next((n for n in range(len(keys), 0, -1) if keys[n - 1] != keys[-1]), 0)
        _require_together(keys[:whole], seen, uri)
        if whole:
            yield table.slice(0, whole)
        left = table.slice(whole)
    if left is not None and left.num_rows:
        _require_together(left["triplet_key"].to_pylist(), seen, uri)
        yield left


def _require_together(keys: list[str], seen: set[bytes], uri: str) -> None:
    for key, _ in groupby(keys):
        digest = bytes.fromhex(key)
        if digest in seen:
            raise DatasetError(
                f"dataset {uri} has the candidates of triplet {key} in several places; make it "
                "again"
            )
        seen.add(digest)
