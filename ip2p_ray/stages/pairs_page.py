"""pairs -> pairs.html: what was kept, what was not and why, with the pictures of some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ip2p_ray import storage
from ip2p_ray.filtering import NOT_BEST
from ip2p_ray.gallery import Bins, ShownCandidate, pairs_page
from ip2p_ray.pairs import PairConfig
from ip2p_ray.rules import SHOWN_CANDIDATES
from ip2p_ray.schema import SCORES, SIMILARITIES
from ip2p_ray.search.triplet import PRUNED
from ip2p_ray.stages import plan
from ip2p_ray.stages.explosion import exploded

SHOWN = 12
"""Candidates of each gallery."""

SHOWN_TRIPLETS = 48
"""Triplets, about, whose rejected pictures are kept too."""

COUNTS = npt.NDArray[np.int64]

_FINE, _COARSE, _SHARES = 1000, 40, 10  # bins of all cosines, of a histogram, of self_replace


def shown_below(triplets: int) -> str:
    """The rejected pictures of a triplet whose key is below this are kept, of so many triplets."""
    share = min(1.0, SHOWN_TRIPLETS / max(1, triplets))
    return f"{round(share * 2**32):08x}" if share < 1 else "g"


def write_page(folder: str, config: PairConfig) -> None:
    """The page `<folder>/pairs.html` of a finished stage; nothing if it is there."""
    place = storage.join(folder, "pairs.html")
    if storage.exists(place):
        return
    below = shown_below(storage.read_manifest(storage.join(folder, "queue")).rows)
    scores = plan.shards(storage.join(folder, "scores"))
    counts, shares = _counted(scores, config)
    best, borderline, rejected = _chosen(scores, config, below)
    pictures = _pictures(folder, pa.concat_tables([best, borderline, rejected]))
    text = pairs_page(
        report=storage.read_manifest(storage.join(folder, "pairs")).reports[-1],
        device_seconds=storage.read_manifest(storage.join(folder, "pairs")).device_seconds,
        histograms={
            name: _coarse(counts[name], least) for name, least in config.thresholds.least().items()
        },
        shares=_points(shares, config.self_replace),
        galleries={
            ("Best", "Kept, with the highest direction similarity."): _shown(best, pictures),
            ("Borderline", "Kept, nearest to a threshold."): _shown(borderline, pictures),
            ("Rejected", "Drawn at random."): _shown(rejected, pictures),
        },
        config=config,
    )
    storage.write_bytes(place, text.encode())


def _counted(scores: Iterable[str], config: PairConfig) -> tuple[dict[str, COUNTS], COUNTS]:
    """Histograms of each similarity over [-1, 1] and of self_replace over its range.

    int64 (2, bin) each: of a similarity the rejected, then the kept; of self_replace those that
    fall short of a threshold, then those that do not, whether better ones were kept or not.
    """
    edges = np.linspace(-1.0, 1.0, _FINE + 1)
    low, high = config.self_replace
    parts = np.linspace(low, max(high, low + 1e-6), _SHARES + 1)
    counts = {name: np.zeros((2, _FINE), np.int64) for name in SIMILARITIES}
    shares = np.zeros((2, _SHARES), np.int64)
    for shard in scores:
        columns = [*SIMILARITIES, "self_replace", "reason"]
        table = storage.read_table(shard, columns=columns)
        kept = pc.is_null(table["reason"])
        for row, side in enumerate((table.filter(pc.invert(kept)), table.filter(kept))):
            for name in SIMILARITIES:
                values = side[name].drop_null().to_numpy()
                counts[name][row] += np.histogram(np.clip(values, -1, 1), edges)[0]
        passed = pc.or_(kept, pc.fill_null(pc.equal(table["reason"], NOT_BEST), False))
        for row, side in enumerate((table.filter(pc.invert(passed)), table.filter(passed))):
            shares[row] += np.histogram(np.clip(side["self_replace"], low, high), parts)[0]
    return counts, shares


def _chosen(
    scores: Iterable[str], config: PairConfig, below: str
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Rows of SCORES: the best, those nearest to a threshold, and some rejected with pictures."""
    columns = pa.schema([*SCORES, ("margin", pa.float32())])
    best = borderline = rejected = columns.empty_table()
    for shard in scores:
        table = storage.read_table(shard, schema=SCORES)
        margins = [
            pc.subtract(table[name], pa.scalar(least, pa.float32()))
            for name, least in config.thresholds.least().items()
        ]
        table = table.append_column("margin", pc.min_element_wise(*margins)).cast(columns)
        kept = pc.is_null(table["reason"])
        shown = pc.and_(pc.less(table["triplet_key"], below), pc.not_equal(table["reason"], PRUNED))
        shown = pc.and_(shown, pc.less(table["index"], SHOWN_CANDIDATES))
        best = _first(best, table.filter(kept), "direction_similarity", "descending")
        borderline = _first(borderline, table.filter(kept), "margin", "ascending")
        rejected = _first(rejected, table.filter(shown), "pair_key", "ascending")
    return best, borderline, rejected


def _first(found: pa.Table, more: pa.Table, name: str, order: str) -> pa.Table:
    table = pa.concat_tables([found, more]).sort_by([(name, order), ("pair_key", "ascending")])
    return table.slice(0, SHOWN)


def _pictures(folder: str, wanted: pa.Table) -> dict[str, tuple[bytes, bytes]]:
    """Source and edited picture of each row, by its pair key."""
    keys = set(wanted["pair_key"].to_pylist())
    triplets = sorted(set(wanted["triplet_key"].to_pylist()))
    found: dict[str, tuple[bytes, bytes]] = {}
    for shard in plan.shards(storage.join(folder, "candidates")):
        there = storage.read_table(shard, columns=["triplet_key"])["triplet_key"]
        if not pc.any(pc.is_in(there, pa.array(triplets, there.type))).as_py():
            continue  # of a shard without any the pictures are not read
        table = exploded(shard, only=triplets)
        for row in table.to_pylist():
            if row["pair_key"] in keys and row["source_image"] is not None:
                images = row["source_image"]["bytes"], row["edited_image"]["bytes"]
                found[row["pair_key"]] = images
    return found


def _shown(rows: pa.Table, pictures: Mapping[str, tuple[bytes, bytes]]) -> list[ShownCandidate]:
    return [
        ShownCandidate(
            caption=row["caption"],
            instruction=row["instruction"],
            edited_caption=row["edited_caption"],
            source_image=pictures[row["pair_key"]][0],
            edited_image=pictures[row["pair_key"]][1],
            reason=row["reason"],
            values={name: row[name] for name in (*SIMILARITIES, "self_replace", "guidance_scale")},
        )
        for row in rows.to_pylist()
        if row["pair_key"] in pictures
    ]


def _coarse(counts: COUNTS, least: float) -> Bins:
    """The histogram over the range that has values, in few bins."""
    used = np.flatnonzero(counts.sum(0))
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, _FINE)
    width = -(-(last - first) // _COARSE)
    first = max(0, min(first, _FINE - width * _COARSE))
    taken = counts[:, first : first + width * _COARSE]
    taken = np.pad(taken, ((0, 0), (0, -taken.shape[1] % width)))
    sums = taken.reshape(2, -1, width).sum(-1)
    step = 2.0 / _FINE
    return Bins(
        start=-1.0 + first * step,
        width=width * step,
        rejected=sums[0].tolist(),
        kept=sums[1].tolist(),
        threshold=least,
    )


def _points(shares: COUNTS, bounds: tuple[float, float]) -> list[tuple[float, float]]:
    """(self_replace, share that passed) of each bin that has candidates."""
    low, high = bounds
    width = (high - low) / _SHARES
    return [
        (low + (place + 0.5) * width, float(kept / (kept + lost)))
        for place, (lost, kept) in enumerate(shares.T)
        if kept + lost
    ]
