"""Which candidates of a triplet are kept, and for what reason each of the others is not.

Source: paper appendix A.2: thresholds on CLIP similarities, then the best 4 by direction. The
reference code has 0.7 for the image threshold where the paper has 0.75; it is a field here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ip2p_ray.errors import ConfigError

NOT_BEST = "not_best"
"""Reason of a candidate that passes every threshold but is not among the best of its triplet."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Lowest similarities of a candidate that is kept: cosines of ViT-L/14, in [-1, 1].

    Another CLIP model has other cosines and needs other thresholds.
    """

    text: float = 0.2
    """Source image with caption, and edited image with edited caption."""
    image: float = 0.75
    """Source image with edited image. The reference code has 0.7."""
    direction: float = 0.2
    """Change of the image with change of the caption."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not -1.0 <= value <= 1.0:
                raise ConfigError(f"threshold {field.name} is a cosine in [-1, 1], got {value}")

    def least(self) -> dict[str, float]:
        """The threshold of each of the four similarities, by its name."""
        return {
            "caption_similarity": self.text,
            "edited_caption_similarity": self.text,
            "image_similarity": self.image,
            "direction_similarity": self.direction,
        }


def rejection(scores: Mapping[str, float | None], thresholds: Thresholds) -> str | None:
    """The first similarity that falls short of its threshold, None when all suffice.

    A similarity that is not a number falls short; one that is None, because there was no caption
    to compute it with, is not asked for.
    """
    for name, threshold in thresholds.least().items():
        score = scores[name]
        if score is not None and not score >= threshold:
            return name
    return None


def select(
    rows: Sequence[Mapping[str, float | None]], thresholds: Thresholds, keep: int | None = 4
) -> list[str | None]:
    """The reason of each candidate of one triplet, None where it is kept.

    Of those that pass, the `keep` with the highest direction_similarity are kept (all of them
    without a `keep`, and the ones without a direction last); equal ones in the order of `index`
    (of the row where it has none).
    """
    if keep is None:
        keep = max(1, len(rows))
    if keep < 1:
        raise ConfigError(f"keep is at least 1, got {keep}")
    reasons = [rejection(row, thresholds) for row in rows]
    passed = [place for place, reason in enumerate(reasons) if reason is None]

    def rank(place: int) -> tuple[float, float]:
        direction, index = rows[place]["direction_similarity"], rows[place].get("index")
        return (
            math.inf if direction is None else -direction,
            place if index is None else index,
        )

    passed.sort(key=rank)
    for place in passed[keep:]:
        reasons[place] = NOT_BEST
    return reasons
