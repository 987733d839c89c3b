"""What decides which scored candidates become pairs, and how it is told of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import NOT_BEST, Thresholds

NO_PICTURE = "picture_not_kept"
"""Reason of a candidate that is among the best now but was not when its pictures were there."""


SHOWN_CANDIDATES = 8
"""Of a triplet whose rejected pictures are kept for people, so many candidates' are."""


def is_shown(triplet_key: str, index: int, below: str) -> bool:
    """Whether a candidate's pictures are kept though it was rejected.

    Those of its triplets are whose keys are below `below`, which is a share of all keys.
    """
    return triplet_key < below and index < SHOWN_CANDIDATES


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Thresholds, and how many of those that pass are kept."""

    thresholds: Thresholds
    keep: int | None = 4
    """At most so many pairs of a triplet, the best by direction; None for all that pass."""

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise ConfigError(f"keep is at least 1, got {self.keep}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Rules | None:
        """The rules in the config of a manifest, None where it has none."""
        if not config.get("thresholds") or "keep" not in config:
            return None
        return cls(thresholds=Thresholds(**config["thresholds"]), keep=config["keep"])

    def changed(
        self,
        *,
        text: float | None = None,
        image: float | None = None,
        direction: float | None = None,
        keep: int | None = None,
    ) -> Rules:
        """The same with what is not None in place of what is here."""
        given = {"text": text, "image": image, "direction": direction}
        changes = {name: value for name, value in given.items() if value is not None}
        thresholds = replace(self.thresholds, **changes)
        return Rules(thresholds=thresholds, keep=self.keep if keep is None else keep)

    def line(self) -> str:
        """For example "text 0.2, image 0.75, direction 0.2, at most 4 of a triplet"."""
        limits = ", ".join(f"{name} {value:g}" for name, value in vars(self.thresholds).items())
        return limits if self.keep is None else f"{limits}, at most {self.keep} of a triplet"


def reject_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of REJECTS of a row of SCORES; its detail is the score that decided."""
    reason = row["reason"]
    value = row.get("direction_similarity" if reason in (NOT_BEST, NO_PICTURE) else reason)
    detail = None if value is None else f"{value:.3f}"
    return {"stage": "pairs", "key": row["pair_key"], "reason": reason, "detail": detail}


def nothing_kept(counts: Mapping[str | None, int], rules: Rules, scores: str) -> str:
    """The sentence that says why there are no pairs."""
    least = rules.thresholds.least()
    told = [
        f"{count:,} by {reason}" + (f" below {least[reason]:g}" if reason in least else "")
        for reason, count in Counter(counts).most_common()
        if reason is not None
    ]
    return (
        f"pairs: none of {sum(counts.values()):,} candidates was accepted: "
        f"{', '.join(told) or 'there are none'}. Their scores are in {scores}; lower that "
        "threshold or bring more candidates, and give a new --out"
    )
