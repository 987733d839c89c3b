"""When to stop and what to prune: probabilities of one triplet's candidates, in plain numbers.

Stop early. Of a triplet's candidates so far, `a` of `n` were accepted, with direction similarities
of mean m and sample standard deviation s; the worst one that would be kept has d. A further one is
accepted with the posterior mean p = (a + alpha) / (n + alpha + beta), and then its direction is
over d + margin with q = P(T > (d + margin - m) / (s sqrt(1 + 1/a))), T being Student's t of a - 1
degrees of freedom: the prediction from normal scores of unknown mean and variance. The triplet
stops when 1 - (1 - p q)^left, the chance of at least one such among those left, is below a level.
Accepted scores are cut off at the threshold, so they are not normal; it is a rule, not a proof. A
margin there has to be: without one, by symmetry alone, number n + 1 is among the best k of all with
probability k / (n + 1), and hardly any triplet would stop.

Give up. With the Beta posterior (alpha + a, beta + n - a) of the acceptance probability, none of
`left` more is accepted with probability B(alpha + a, beta + n - a + left) / B(alpha + a,
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
"""Accepted candidates without which their spread says too little to stop early."""


def chance_of_better(
    directions: Sequence[float],
    *,
    made: int,
    left: int,
    keep: int,
    margin: float,
    prior: tuple[float, float],
) -> float:
    """The chance that one of `left` more is accepted and better than the worst kept by `margin`.

    `directions` are those of the accepted among `made` candidates. It is 1 while fewer than `keep`
    or FEWEST were accepted, and 0 when none is left.
    """
    count = len(directions)
    if not left:
        return 0.0
    if count < max(keep, FEWEST):
        return 1.0
    accepted = (count + prior[0]) / (made + sum(prior))
    bar = sorted(directions, reverse=True)[keep - 1] + margin
    distance = bar - statistics.fmean(directions)
    spread = statistics.stdev(directions) * math.sqrt(1 + 1 / count)
    over = upper_tail(distance / spread, count - 1) if spread else float(distance <= 0)
    return 1 - (1 - accepted * over) ** left


def chance_of_any(*, accepted: int, made: int, left: int, prior: tuple[float, float]) -> float:
    """The chance that at least one of `left` more candidates is accepted."""
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
