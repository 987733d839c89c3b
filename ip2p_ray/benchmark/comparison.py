"""Ways to search the same triplets, side by side: what each saves, what it loses, and a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ip2p_ray.filtering import NOT_BEST
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.triplet import PRUNED, Candidate, Searched

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
FULL = "full"
"""The search with all options off."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """One way to search some triplets, done."""

    options: SearchConfig
    searched: Sequence[Searched]
    device_s: float
    unet_rows: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way to search the same triplets. An accepted pair is one that is kept."""

    options: dict[str, Any]
    """What differs from SearchConfig's defaults."""
    device_s: float
    """Seconds of the device; on a CPU those that this process spent computing."""
    unet_rows: int
    """Rows that went through the UNet; unlike seconds the same in every run."""
    candidates: int
    """Begun, pruned ones among them."""
    pruned: int
    never_made: int
    passed: int
    """Candidates that reached every threshold."""
    pairs: int
    """Of these, the kept ones."""
    sources: int
    """Different source pictures of the accepted pairs."""
    device_s_per_accepted_pair: float | None
    """None where no pair was accepted."""
    unet_rows_per_accepted_pair: float | None
    false_reject_rate: float | None
    """Share of the candidates that pass in full generation and were pruned or never made; None
    where candidates share sources and so are others than in full generation."""
    lost_pairs: float | None
    """The same share of the pairs that full generation keeps; others may be kept instead."""
    lost_triplets: float | None
    """Share of the triplets with a pair in full generation that have none."""
    ended: dict[str, int]
    """How many triplets ended in which way."""
    quantiles: dict[str, list[float]]
    """QUANTILES of the accepted pairs' self_replace, guidance_scale and two similarities."""


def compare(came: Run, full: Run) -> Measured:
    """The figures of a run beside those of full generation of the same triplets."""
    options = came.options
    made, whole = _candidates(came), _candidates(full)
    passed = {key for key, one in made.items() if one.reason in (None, NOT_BEST)}
    pairs = {key for key, one in made.items() if one.reason is None}
    full_passed = {key for key, one in whole.items() if one.reason in (None, NOT_BEST)}
    full_pairs = {key for key, one in whole.items() if one.reason is None}
    alike = options.share_source is None
    defaults = SearchConfig()
    changed = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if getattr(options, field.name) != getattr(defaults, field.name)
    }
    return Measured(
        options=changed,
        device_s=came.device_s,
        unet_rows=came.unet_rows,
        candidates=len(made),
        pruned=sum(one.reason == PRUNED for one in made.values()),
        never_made=sum(one.never_made for one in came.searched),
        passed=len(passed),
        pairs=len(pairs),
        sources=len({(key, made[key, index].request.seed) for key, index in pairs}),
        device_s_per_accepted_pair=came.device_s / len(pairs) if pairs else None,
        unet_rows_per_accepted_pair=came.unet_rows / len(pairs) if pairs else None,
        false_reject_rate=_missing(full_passed, passed) if alike else None,
        lost_pairs=_missing(full_pairs, pairs) if alike else None,
        lost_triplets=_missing({key for key, _ in full_pairs}, {key for key, _ in pairs}),
        ended=dict(Counter(one.ended for one in came.searched)),
        quantiles=_quantiles([made[key] for key in sorted(pairs)]),
    )


def table(measured: Mapping[str, Measured]) -> str:
    """Two tables in plain text: what was saved and lost, and what the accepted pairs look like."""
    full = measured[FULL]
    lines = [
        f"{'':16} {'device s':>9} {'s/pair':>8} {'ratio':>6} {'rows/pair':>9} {'ratio':>6} "
        f"{'begun':>6} {'pruned':>6} {'unmade':>6} {'pairs':>6} {'sources':>7} {'false rej.':>10} "
        f"{'lost pairs':>10} {'lost tripl.':>11}"
    ]
    for name, one in measured.items():
        seconds, rows = one.device_s_per_accepted_pair, one.unet_rows_per_accepted_pair
        lines.append(
            f"{name:16} {one.device_s:9.1f} {_number(seconds, 8, 3)} "
            f"{_ratio(full.device_s_per_accepted_pair, seconds)} {_number(rows, 9, 0)} "
            f"{_ratio(full.unet_rows_per_accepted_pair, rows)} "
            f"{one.candidates:6d} {one.pruned:6d} {one.never_made:6d} "
            f"{one.pairs:6d} {one.sources:7d} "
            f"{_share(one.false_reject_rate, 10)} {_share(one.lost_pairs, 10)} "
            f"{_share(one.lost_triplets, 11)}"
        )
    lines += ["", f"{'accepted pairs':37}" + "".join(f"{100 * q:7.0f} %" for q in QUANTILES)]
    for column in full.quantiles:
        for name, one in measured.items():
            values = "".join(f"{value:9.3f}" for value in one.quantiles[column])
            lines.append(f"{column:20} {name:16}{values}")
    return "\n".join(lines)


def _candidates(run: Run) -> dict[tuple[str, int], Candidate]:
    return {
        (str(one.triplet["triplet_key"]), candidate.request.index): candidate
        for one in run.searched
        for candidate in one.candidates
    }


def _missing(expected: set[Any], found: set[Any]) -> float | None:
    return len(expected - found) / len(expected) if expected else None


def _quantiles(pairs: Sequence[Candidate]) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    for name in ("self_replace", "guidance_scale"):
        columns[name] = [getattr(one.request, name) for one in pairs]
    for name in ("direction_similarity", "image_similarity"):
        columns[name] = [(one.similarities or {})[name] for one in pairs]
    return {
        name: np.quantile(values, QUANTILES).tolist() if values else []
        for name, values in columns.items()
    }


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _ratio(full: float | None, value: float | None) -> str:
    return f"{'-':>6}" if full is None or value is None else f"{value / full:6.2f}"


def _share(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{100 * value:{width - 2}.1f} %"
