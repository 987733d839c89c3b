"""When to stop and what to prune: probabilities of one triplet's candidates, in plain numbers.

A unit is a candidate, or all candidates of one source where sources are shared: these resemble
each other, and to count them one by one would be too sure of everything. A unit is accepted when
one of its candidates is, and its score is the best direction similarity of those.

Stop early. Of `n` units so far `a` were accepted, with scores of mean m and sample standard
deviation s. A further one is accepted with the posterior mean p = (a + alpha) / (n + alpha + beta),
and then its score is over the bar d with q = P(T > (d - m) / (s sqrt(1 + 1/a))), T being Student's
t of a - 1 degrees of freedom: the prediction from normal scores of unknown mean and variance. The
bar is the direction similarity of the worst candidate that would be kept, plus a margin. The
triplet stops when 1 - (1 - p q)^left, the chance of at least one such among the units left, is
below a level. Accepted scores are cut off at the threshold, so they are not normal; it is a rule,
not a proof. A margin there has to be: without one, by symmetry alone, number n + 1 is among the
best k of all with probability k / (n + 1), and hardly any triplet would stop.

Give up. With the Beta posterior (alpha + a, beta + n - a) of the acceptance probability, none of
`left` more units is accepted with probability B(alpha + a, beta + n - a + left) / B(alpha + a,
beta + n - a); the triplet stops when one minus that is below a level.

Prune. A candidate is hopeless when a similarity of its predicted pictures is below that
similarity's threshold by more than its margin.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from ip2p_ray.filtering import Thresholds
from ip2p_ray.search.options import SearchConfig

FEWEST = 3
"""Accepted units without which their spread says too little to stop early."""


def chance_of_better(
    scores: Sequence[float], *, bar: float, made: int, left: int, prior: tuple[float, float]
) -> float:
    """The chance that one of `left` more units is accepted with a score over the bar.

    `scores` are those of the accepted among `made` units. It is 1 while they are fewer than
    FEWEST, and 0 when none is left.
    """
    count = len(scores)
    if not left:
        return 0.0
    if count < FEWEST:
        return 1.0
    accepted = (count + prior[0]) / (made + sum(prior))
    distance = bar - statistics.fmean(scores)
    spread = statistics.stdev(scores) * math.sqrt(1 + 1 / count)
    over = upper_tail(distance / spread, count - 1) if spread else float(distance <= 0)
    return 1 - (1 - accepted * over) ** left


def chance_of_any(*, accepted: int, made: int, left: int, prior: tuple[float, float]) -> float:
    """The chance that at least one of `left` more units is accepted."""
    yes, no = prior[0] + accepted, prior[1] + made - accepted
    return -math.expm1(_log_beta(yes, no + left) - _log_beta(yes, no))


def hopeless(predicted: Mapping[str, float], thresholds: Thresholds, options: SearchConfig) -> bool:
    """Whether the predicted similarities leave no hope; one that is not a number does not."""
    floors = {
        "caption_similarity": (thresholds.text, options.prune_text),
        "edited_caption_similarity": (thresholds.text, options.prune_text),
        "image_similarity": (thresholds.image, options.prune_image),
        "direction_similarity": (thresholds.direction, options.prune_direction),
    }
    return any(
        margin is not None and not predicted[name] >= threshold - margin
        for name, (threshold, margin) in floors.items()
    )


def upper_tail(value: float, freedom: int) -> float:
    """P(T > value) for Student's t of `freedom` degrees of freedom.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4: a finite series for whole degrees.
    """
    angle = math.atan(abs(value) / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    series = 0.0
    for power in range(odd, freedom - 1, 2):
        series += term
        term *= square * (power + 1) / (power + 2)
    inside = math.sin(angle) * series
    if odd:
        inside = (angle + inside) * 2 / math.pi
    return (1 - inside) / 2 if value >= 0 else (1 + inside) / 2


def _log_beta(first: float, second: float) -> float:
    return math.lgamma(first) + math.lgamma(second) - math.lgamma(first + second)
