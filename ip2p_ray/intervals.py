"""Means with bootstrap confidence intervals, resampled by group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ip2p_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BootstrapConfig:
    """How sure a mean is said to be."""

    level: float = 0.95
    """Share of the resampled means that the interval holds, in (0, 1)."""
    resamples: int = 2000
    """Draws of as many groups as there are, with replacement."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ConfigError(f"level lies in (0, 1), got {self.level}")
        if self.resamples < 100:
            raise ConfigError(f"resamples is at least 100, got {self.resamples}")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and where it would lie had other groups been asked."""

    mean: float
    low: float | None
    """Ends of the interval; None where there is one group, of which nothing can be said."""
    high: float | None
    count: int
    """Values."""
    groups: int
    """Groups that they come from; values of a group are not independent."""

    def as_dict(self) -> dict[str, Any]:
        """The fields, as JSON can express them."""
        return asdict(self)


def estimate(
    values: Sequence[float], groups: Sequence[str], config: BootstrapConfig
) -> Estimate | None:
    """The mean of the values with its percentile interval; None if there are none.

    Whole groups are drawn, so values of one picture, or of one triplet, count as what they are:
    not independent. The same values in another order give the same interval.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13; the
    percentile interval without correction, which is too short for few groups (below about 20).
    """
    if len(values) != len(groups):
        raise ConfigError(f"{len(values)} values but {len(groups)} groups")
    if not values:
        return None
    sums: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        sums[group].append(float(value))
    total = np.array([sum(sorted(sums[name])) for name in sorted(sums)])
    size = np.array([len(sums[name]) for name in sorted(sums)], dtype=np.float64)
    low = high = None
    if len(total) > 1:
        rng = np.random.default_rng(config.seed)
        share = np.full(len(total), 1 / len(total))
        drawn = rng.multinomial(len(total), share, size=config.resamples).astype(np.float64)
        means = (drawn @ total) / (drawn @ size)
        tail = (1 - config.level) / 2
        low, high = (float(end) for end in np.quantile(means, [tail, 1 - tail]))
    return Estimate(
        mean=float(total.sum() / size.sum()),
        low=low,
        high=high,
        count=len(values),
        groups=len(total),
    )


def difference(
    values: Mapping[str, float],
    others: Mapping[str, float],
    groups: Mapping[str, str],
    config: BootstrapConfig,
) -> Estimate | None:
    """The mean of value minus other over the keys that both have, with its interval.

    Paired: what makes a question hard for both is not counted as a difference between them.
    """
    both = sorted(values.keys() & others.keys())
    return estimate(
        [values[key] - others[key] for key in both], [groups[key] for key in both], config
    )
