"""A user's own pairs -> checked -> pairs, with scores and rejects beside them.

`checked` holds what is known of every row that came, without pictures (`stages.checked`). Reasons,
splits and the datasets are read off it, and the pictures once more from the input. Where too few
rows can be used it is removed, because of an input only names and sizes of tables tell that it
changed: the same command checks all of it anew, and finds what was mended. One process does it, in
threads; no Ray has to run.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.errors import DatasetError, ImageError, StageError
from ip2p_ray.layouts import Given, PairFiles
from ip2p_ray.own_pairs import DUPLICATE, UNUSABLE, OwnPairsConfig, stored_picture
from ip2p_ray.report import Report
from ip2p_ray.rules import Rules, nothing_kept, reject_row
from ip2p_ray.schema import PAIRS, REJECTS, SCORES, SPLITS, caption_key
from ip2p_ray.stages import run
from ip2p_ray.stages.checked import check_rows, in_chunks
from ip2p_ray.stages.shards import TableShards, clear, require_free
from ip2p_ray.stages.verdicts import Verdicts

if TYPE_CHECKING:  # it loads slowly, and most runs have no judge
    from ip2p_ray.clip import Clip

logger = logging.getLogger(__name__)

_READ = 20_000


@dataclass(frozen=True, kw_only=True)
class OwnPairs:
    """Whose pairs they are, and what is made of them."""

    files: PairFiles
    config: OwnPairsConfig
    rules: Rules | None = None
    """What similarities have to reach; None asks nothing of them."""
    held_out: float = 0.05
    """Share of pairs, in [0, 1], that no editor is trained on."""
    max_reject_share: float = 0.1
    """Share of rows, in [0, 1], that may be unusable; repeated rows are not counted."""


def collect_own_pairs(own: OwnPairs, folder: str, judge: Clip | None = None) -> storage.Manifest:
    """The dataset `<folder>/pairs` of the files, with checked, scores and rejects/pairs beside it.

    `judge` computes the similarities that a row's captions allow, of the pictures as they are
    stored. Rows that share a picture, the three texts or a group are in one split.

    Raises:
        DatasetError: a file is missing or broken, or holds no pairs; says which and what it has.
        ConfigError: something else lies in the folder.
        StageError: too many rows are unusable, or none could be kept; says why. Then the next run
            checks all rows anew.
    """
    inputs = own.files.inputs()
    checked = storage.join(folder, "checked")
    uris = {name: storage.join(folder, name) for name in ("scores", "pairs")}
    uris["rejects"] = storage.join(folder, "rejects", "pairs")
    for uri in (checked, *uris.values()):
        require_free(uri)
    _remove_orphans(checked, uris)
    models = {"judge": judge.fingerprint()} if judge else {}
    origin = run.Origin(
        dataset="checked", config={**asdict(own.config), "files": inputs}, models=models
    )

    def look() -> list[Report]:
        check_rows(own.files, checked, own.config, judge)
        return []

    found = run.make(checked, origin, look)
    config = {"held_out": own.held_out, **(asdict(own.rules) if own.rules else {})}
    rest = _Rest(own, checked)

    def make(dataset: str, build: Callable[[str], list[Report]]) -> storage.Manifest:
        sources = {"checked": found.recipe}
        made = run.Origin(dataset=dataset, config=config, models=models, sources=sources)
        return run.make(uris[dataset], made, lambda: build(uris[dataset]))

    try:
        make("scores", rest.write_scores)
        make("rejects", rest.write_rejects)
        rest.require_enough(uris)
    except StageError:
        if not _is_whole(uris["pairs"]):
            storage.remove_all(checked)  # scores and rejects stay, for people, until the next run
        raise
    return make("pairs", rest.write_pairs)


def _remove_orphans(checked: str, uris: Mapping[str, str]) -> None:
    """Removes what was read off a CHECKED that is gone: another one says other things.

    Whole pairs stay, with all that lies beside them.
    """
    names = (storage.MANIFEST, run.ORIGIN)
    if any(storage.exists(storage.join(checked, name)) for name in names):
        return
    if _is_whole(uris["pairs"]):
        return
    for uri in uris.values():
        place = storage.join(uri, run.ORIGIN)
        if not storage.exists(place):
            continue
        with suppress(ValueError):  # what cannot be read is told by whoever makes the dataset
            if "checked" in json.loads(storage.read_bytes(place)).get("sources", {}):
                storage.remove_all(uri)


def _is_whole(uri: str) -> bool:
    return storage.exists(storage.join(uri, storage.MANIFEST))


class _Rest:
    """What is read off CHECKED by its verdicts."""

    def __init__(self, own: OwnPairs, checked: str) -> None:
        self._own, self._checked = own, checked
        self._verdicts = Verdicts(checked, own.rules, own.held_out)

    def write_scores(self, uri: str) -> list[Report]:
        clear(uri)
        rows = (
            row for row in self._verdicts.rows() if row["pair_key"] and row["reason"] != DUPLICATE
        )
        shards = TableShards(uri, "scores", SCORES)
        tables = [SCORES.empty_table()]
        for part in in_chunks(rows, _READ):
            for row in part:
                row["split"] = self._verdicts.split(row)
            tables.append(
                pa.Table.from_pylist(
                    [{name: row[name] for name in SCORES.names} for row in part], schema=SCORES
                )
            )
        shards.add(pa.concat_tables(tables).sort_by("triplet_key"))  # whoever judges reads by it
        shards.close()
        return []

    def write_rejects(self, uri: str) -> list[Report]:
        clear(uri)
        shards = TableShards(uri, "rejects", REJECTS)
        dropped = (row for row in self._verdicts.rows() if row["reason"] is not None)
        for part in in_chunks(map(_reject, dropped), _READ):
            shards.add_rows(part)
        shards.close()
        return []

    def require_enough(self, uris: Mapping[str, str]) -> None:
        """Fails where too many rows are unusable, or none is left."""
        counts = Counter(self._verdicts.reasons)
        total = counts.total()
        bad = Counter({name: counts[name] for name in UNUSABLE if counts[name]})
        told = ", ".join(f"{reason} {count:,}" for reason, count in bad.most_common())
        if not total:
            raise StageError("pairs: there is no row in the input")
        if bad.total() > self._own.max_reject_share * total:
            raise StageError(
                f"pairs: {bad.total():,} of {total:,} rows are unusable, more than a share of "
                f"{self._own.max_reject_share:g}: {told}; each with its place is in "
                f"{uris['rejects']}, and --max-reject-share allows more"
            )
        if not counts[None]:
            if self._own.rules:
                raise StageError(nothing_kept(counts, self._own.rules, uris["scores"]))
            raise StageError(f"pairs: none of {total:,} rows could be kept: {told}")

    def write_pairs(self, uri: str) -> list[Report]:
        began = time.monotonic()
        clear(uri)
        shards = {split: TableShards(uri, split, PAIRS) for split in SPLITS}
        both = self._with_pictures()
        with ThreadPoolExecutor(run.usable_cores()) as pool:
            for part in in_chunks(both):
                for row in pool.map(self._pair, part):
                    shards[row["split"]].add_rows([row])
        for own in shards.values():
            own.close()
        self._tell({split: own.rows for split, own in shards.items()})
        return [Report.count("pairs", self._verdicts.reasons, time.monotonic() - began)]

    def _pair(self, both: tuple[dict[str, Any], Given]) -> dict[str, Any]:
        row, given = both
        try:
            pictures = {
                f"{name}_image": stored_picture(
                    picture, digest=row[f"{name}_digest"], config=self._own.config
                )
                for name, picture in (("source", given.source), ("edited", given.edited))
            }
        except ImageError as error:
            raise DatasetError(_changed(row["place"], self._checked)) from error
        key = caption_key(row["caption"]) if row["caption"] else None
        return {**row, **pictures, "caption_key": key, "writer": "own"}

    def _with_pictures(self) -> Iterator[tuple[dict[str, Any], Given]]:
        for row, given in itertools.zip_longest(self._verdicts.rows(), self._own.files):
            if row is None or given is None or row["place"] != given.place:
                raise DatasetError(_changed((row or {}).get("place", "the end"), self._checked))
            if row["reason"] is None:
                yield {**row, "split": self._verdicts.split(row)}, given

    def _tell(self, splits: Mapping[str, int]) -> None:
        """What has to be known before these pairs are trained on."""
        if not splits["train"] and self._own.held_out < 1:
            logger.warning("pairs: all of them are held out, since they share pictures or texts")
        sizes = self._verdicts.sizes
        if len(sizes) > 1 and self._own.config.resolution is None:
            size, count = sizes.most_common(1)[0]
            logger.warning(
                "pairs: their pictures have %d sizes (%d have %d x %d); to encode and train on "
                "them, bring them to one with --resolution",
                len(sizes),
                count,
                *size,
            )


def _reject(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of REJECTS: of a scored pair by its key, of what is no pair by its place."""
    if row["pair_key"] and row["reason"] != DUPLICATE:
        return reject_row(row)
    return {
        "stage": "pairs",
        "key": row["place"],
        "reason": row["reason"],
        "detail": row["detail"],
    }


def _changed(place: str, checked: str) -> str:
    return (
        f"the input changed since it was checked, first at {place}; delete {checked} and run the "
        "same command again"
    )
