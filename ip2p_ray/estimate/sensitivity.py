"""What an estimate would be with one quantity doubled or halved, and how much it follows it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ip2p_ray.estimate.arithmetic import Estimate, estimate
from ip2p_ray.estimate.config import Basis, Prices, Speed, Speeds, Workload

Change = Callable[[Basis, Prices | None, float], tuple[Basis, Prices | None]]


@dataclass(frozen=True, kw_only=True)
class Changed:
    """The estimate at half and at twice a quantity."""

    name: str
    halved: Estimate
    doubled: Estimate

    def elasticity(self, total: Callable[[Estimate], float]) -> float:
        """By how many percent a total changes for one percent of the quantity, on average.

        0 where the total is 0.
        """
        low, high = total(self.halved), total(self.doubled)
        return math.log(high / low) / math.log(4.0) if low > 0 and high > 0 else 0.0


def sensitivity(basis: Basis, prices: Prices | None = None) -> tuple[Changed, ...]:
    """One for each of CHANGES; what is a whole number or a share stays one."""

    def at(change: Change, factor: float) -> Estimate:
        return estimate(*change(basis, prices, factor))

    return tuple(
        Changed(name=name, halved=at(change, 0.5), doubled=at(change, 2.0))
        for name, change in CHANGES.items()
        if prices is not None or name not in OF_THE_PRICES
    )


def faster(speeds: Speeds, factor: float) -> Speeds:
    """The speeds of devices that do everything so many times as fast; what is fixed stays."""
    changed: dict[str, Any] = {
        name: replace(speed, seconds=speed.seconds / factor)
        for name, speed in vars(speeds).items()
        if isinstance(speed, Speed) and name != "score"
    }
    return replace(speeds, **changed)


def _whole(name: str) -> Change:
    def change(basis: Basis, prices: Prices | None, factor: float) -> tuple[Basis, Prices | None]:
        value = max(1, round(getattr(basis.workload, name) * factor))
        return _of_work(basis, replace(basis.workload, **{name: value})), prices

    return change


def _acceptance(basis: Basis, prices: Prices | None, factor: float) -> tuple[Basis, Prices | None]:
    share = min(1.0, basis.workload.acceptance * factor)
    return _of_work(basis, replace(basis.workload, acceptance=share)), prices


def _speed(basis: Basis, prices: Prices | None, factor: float) -> tuple[Basis, Prices | None]:
    return replace(basis, speeds=faster(basis.speeds, factor)), prices


def _priced(*names: str) -> Change:
    def change(basis: Basis, prices: Prices | None, factor: float) -> tuple[Basis, Prices | None]:
        if prices is None:
            return basis, None
        return basis, replace(prices, **{name: getattr(prices, name) * factor for name in names})

    return change


def _of_work(basis: Basis, work: Workload) -> Basis:
    return replace(basis, workload=work)


CHANGES: dict[str, Change] = {
    "captions": _whole("captions"),
    "candidates a triplet": _whole("candidates"),
    "sampling steps": _whole("steps"),
    "acceptance": _acceptance,
    "training steps": _whole("train_steps"),
    "batch of training": _whole("batch_size"),
    "speed of devices": _speed,
    "price of devices": _priced("device_hour"),
    "price of storage": _priced("storage_gb_month"),
    "price of tokens": _priced("prompt_million", "reply_million"),
}
"""By what is doubled and halved."""

OF_THE_PRICES = ("price of devices", "price of storage", "price of tokens")
"""Those that change nothing where there are no prices."""
