"""Which candidates of a triplet are kept, and for what reason each of the others is not.

Source: paper appendix A.2: thresholds on CLIP similarities, then the best 4 by direction. The
reference code has 0.7 for the image threshold where the paper has 0.75; it is a field here.
"""

from __future__ import annotations

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


def least_similarities(thresholds: Thresholds) -> dict[str, float]:
    """The least that each similarity has to be, in the order in which they are asked about."""
    return {
        "caption_similarity": thresholds.text,
        "edited_caption_similarity": thresholds.text,
        "image_similarity": thresholds.image,
        "direction_similarity": thresholds.direction,
    }


def rejection(scores: Mapping[str, float], thresholds: Thresholds) -> str | None:
    """The first similarity that falls short of its threshold, None when all suffice.

    A similarity that is not a number falls short.
    """
    for name, threshold in least_similarities(thresholds).items():
        if not scores[name] >= threshold:
            return name
    return None


def select(
    rows: Sequence[Mapping[str, float]], thresholds: Thresholds, keep: int = 4
) -> list[str | None]:
    """The reason of each candidate of one triplet, None where it is kept.

    Of those that pass, the `keep` with the highest direction_similarity are kept; equal ones in
    the order of `index` (of the row where it has none).
    """
    if keep < 1:
        raise ConfigError(f"keep is at least 1, got {keep}")
    reasons = [rejection(row, thresholds) for row in rows]
    passed = [place for place, reason in enumerate(reasons) if reason is None]
    passed.sort(
        key=lambda place: (-rows[place]["direction_similarity"], rows[place].get("index", place))
    )
    for place in passed[keep:]:
        reasons[place] = NOT_BEST
    return reasons
