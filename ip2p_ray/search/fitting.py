"""Priors and margins of a search, read off triplets that were searched in full before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import Thresholds, rejection
from ip2p_ray.schema import SIMILARITIES
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.triplet import Candidate, Searched

CONCENTRATIONS = tuple(2.0 ** (power / 4) for power in range(-16, 33))
"""alpha + beta of the priors that are tried, from 1/16 to 256."""


def acceptance_prior(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Beta prior of triplets of which so many units (accepted, made) were accepted; see `rules`.

    Its mean is the share of all units, half a unit added on either side; its
    concentration, of those in CONCENTRATIONS, makes the counts most likely (beta-binomial).
    """
    accepted, made = (sum(column) for column in zip(*counts, strict=True))
    mean = (accepted + 0.5) / (made + 1)

    def likelihood(total: float) -> float:
        yes, no = total * mean, total * (1 - mean)
        return sum(
            math.lgamma(yes + a)
            - math.lgamma(yes)
            + math.lgamma(no + n - a)
            - math.lgamma(no)
            + math.lgamma(total)
            - math.lgamma(total + n)
            for a, n in counts
        )

    best = max(CONCENTRATIONS, key=likelihood)
    return best * mean, best * (1 - mean)


def fit(
    options: SearchConfig,
    pilots: Iterable[Searched],
    thresholds: Thresholds,
    *,
    lose: float = 0.05,
) -> SearchConfig:
    """The options with prior and margins that suit the pilots, as far as they are read.

    Where candidates of the pilots were predicted, each of the three margins is the smallest that
    calls at most a third of `lose`, in [0, 1), of the accepted ones hopeless. Pilots for that are
    searched with `prune_at` and without margins, which predicts all and prunes none.

    Raises:
        ConfigError: margins are asked for, but no pilot candidate was accepted.
    """
    searched = list(pilots)
    counts = [_units(one, thresholds, options.share_source or 1) for one in searched]
    if options.decides:
        options = replace(options, acceptance_prior=acceptance_prior(counts))
    if options.prune_at is None:
        return options
    accepted = [predicted for one in searched for predicted in _accepted(one, thresholds)]
    if not accepted:
        raise ConfigError("no candidate of the pilots was accepted: there are no margins to fit")
    rows = np.array([[predicted[name] for name in SIMILARITIES] for predicted in accepted])
    lowest = {
        "prune_text": (thresholds.text, rows[:, :2].min(axis=1)),
        "prune_image": (thresholds.image, rows[:, 2]),
        "prune_direction": (thresholds.direction, rows[:, 3]),
    }
    margins = {
        name: max(0.0, threshold - float(np.quantile(values, lose / 3, method="lower")))
        for name, (threshold, values) in lowest.items()
    }
    return replace(options, **margins)  # type: ignore[arg-type]


def _units(searched: Searched, thresholds: Thresholds, share: int) -> tuple[int, int]:
    """How many units, each the candidates of one source, were accepted, and how many made."""
    accepted = {one.request.index // share for one in _passing(searched, thresholds)}
    return len(accepted), len({one.request.index // share for one in searched.candidates})


def _accepted(searched: Searched, thresholds: Thresholds) -> list[dict[str, float]]:
    """Predicted similarities, empty where there are none, of the candidates that pass."""
    return [dict(one.predicted or {}) for one in _passing(searched, thresholds)]


def _passing(searched: Searched, thresholds: Thresholds) -> list[Candidate]:
    return [
        candidate
        for candidate in searched.candidates
        if candidate.similarities is not None
        and rejection(candidate.similarities, thresholds) is None
    ]
