"""What is still to be made of one triplet, and what came of it; knows no batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from ip2p_ray.candidates import CandidateRequest
from ip2p_ray.filtering import rejection, select
from ip2p_ray.pairs import PairConfig, Pictures, candidate_requests
from ip2p_ray.rules import is_shown
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.rules import chance_of_any, chance_of_better, hopeless

PRUNED = "pruned"
"""Reason of a candidate whose predicted pictures were hopeless; it was not finished."""

Ended = Literal["all", "enough", "futile"]
"""Why a triplet's search ended: every candidate made, stopped early, given up."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Made:
    """A finished candidate, as whoever makes it hands it over."""

    similarities: Mapping[str, float]
    """The four of `clip.Similarities`."""
    source_image: Pictures
    """uint8 (height, width, 3)."""
    edited_image: Pictures


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """What came of one request."""

    request: CandidateRequest
    predicted: Mapping[str, float] | None
    """Similarities of the pictures predicted part-way; None where nothing is pruned."""
    similarities: Mapping[str, float] | None
    """Of the finished pictures; None of a pruned candidate."""
    reason: str | None
    """`filtering`'s reason or PRUNED; None of a kept one."""
    source_image: Pictures | None
    """uint8 (height, width, 3); None unless kept or shown."""
    edited_image: Pictures | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Searched:
    """A triplet whose search has ended."""

    triplet: Mapping[str, Any]
    """The row that was given."""
    candidates: tuple[Candidate, ...]
    """All that were begun, by their index."""
    ended: Ended
    never_made: int
    """How many of the config's candidates were not begun."""


class TripletSearch:
    """The state of one triplet: `ask` for candidates, `prune` or `record` each, ask again.

    What is asked for depends on the scores of this triplet's candidates alone, whole rounds of
    them, and not on the order in which they arrive or on other triplets; so the set of candidates
    does not depend on batches either.
    """

    def __init__(
        self,
        triplet: Mapping[str, Any],
        config: PairConfig,
        options: SearchConfig,
        recipe: str,
        shown_below: str = "",
    ) -> None:
        self._triplet, self._config, self._options = triplet, config, options
        self._shown_below = shown_below
        self._requests = candidate_requests(
            triplet["triplet_key"],
            triplet["caption"],
            triplet["edited_caption"],
            config,
            recipe,
            share_source=options.share_source or 1,
        )
        self._asked = self._answered = 0
        self._predicted: dict[int, Mapping[str, float]] = {}
        self._similarities: dict[int, Mapping[str, float]] = {}
        self._pictures: dict[int, Made] = {}
        self._best: list[int] = []  # accepted ones that will be kept unless better ones come
        self._ended: Ended | None = None

    @property
    def waiting(self) -> bool:
        """Whether candidates that were asked for have not been answered yet."""
        return self._answered < self._asked

    def ask(self) -> list[tuple[CandidateRequest, ...]]:
        """The candidates of the next round, in groups of one source; none once it has ended."""
        self._ended = self._decide()
        if self._ended is not None:
            return []
        share = self._options.share_source or 1
        each = self._options.decide_every if self._options.decides else len(self._requests)
        wanted = self._requests[self._asked : self._asked + each]
        self._asked += len(wanted)
        return [tuple(group) for _, group in groupby(wanted, lambda one: one.index // share)]

    def prune(self, request: CandidateRequest, predicted: Mapping[str, float]) -> bool:
        """Takes a prediction; True where the candidate is hopeless and thereby answered."""
        self._predicted[request.index] = predicted
        pruned = hopeless(predicted, self._config.thresholds, self._options)
        self._answered += pruned
        return pruned

    def record(self, request: CandidateRequest, made: Made) -> None:
        """Takes a finished candidate; holds on to no more pictures than kept or shown ones."""
        self._answered += 1
        index = request.index
        self._similarities[index] = made.similarities
        accepted = rejection(made.similarities, self._config.thresholds) is None
        if accepted or self._is_shown(index):
            # a copy: the picture is a part of its batch's array, which is to go
            source, edited = made.source_image.copy(), made.edited_image.copy()
            self._pictures[index] = replace(made, source_image=source, edited_image=edited)
        if accepted:
            self._best = sorted([*self._best, index], key=self._rank)[: self._config.keep]
            self._pictures = {
                index: pictures
                for index, pictures in self._pictures.items()
                if index in self._best or self._is_shown(index)
            }

    def result(self) -> Searched:
        """All that was made, judged together; to be asked for once `ask` has returned nothing."""
        assert self._ended is not None
        return Searched(
            triplet=self._triplet,
            candidates=tuple(self._candidates()),
            ended=self._ended,
            never_made=len(self._requests) - self._asked,
        )

    def _decide(self) -> Ended | None:
        left = len(self._requests) - self._asked
        if not left:
            return "all"
        if not self._asked:
            return None
        options, share = self._options, self._options.share_source or 1
        accepted = {
            index: scores["direction_similarity"]
            for index, scores in sorted(self._similarities.items())
            if rejection(scores, self._config.thresholds) is None
        }
        best: dict[int, float] = {}
        for index, direction in accepted.items():
            best[index // share] = max(direction, best.get(index // share, direction))
        units = math.ceil(len(self._requests) / share)
        made = self._asked // share  # whole units: decide_every is a multiple of share_source
        known: dict[str, Any] = {
            "made": made,
            "left": units - made,
            "prior": options.acceptance_prior,
        }
        if options.stop_early is not None and len(accepted) >= self._config.keep:
            worst = sorted(accepted.values(), reverse=True)[self._config.keep - 1]
            bar = worst + options.stop_margin
            if chance_of_better([*best.values()], bar=bar, **known) < options.stop_early:
                return "enough"
        level = options.give_up
        if level is not None and chance_of_any(accepted=len(best), **known) < level:
            return "futile"
        return None

    def _is_shown(self, index: int) -> bool:
        return is_shown(self._triplet["triplet_key"], index, self._shown_below)

    def _rank(self, index: int) -> tuple[float, int]:
        return -self._similarities[index]["direction_similarity"], index

    def _candidates(self) -> Sequence[Candidate]:
        finished = sorted(self._similarities)
        rows = [{**self._similarities[index], "index": index} for index in finished]
        reasons = select(rows, self._config.thresholds, self._config.keep)
        reason = dict(zip(finished, reasons, strict=True))
        found = []
        for request in self._requests[: self._asked]:
            made = self._pictures.get(request.index)
            found.append(
                Candidate(
                    request=request,
                    predicted=self._predicted.get(request.index),
                    similarities=self._similarities.get(request.index),
                    reason=reason.get(request.index, PRUNED),
                    source_image=None if made is None else made.source_image,
                    edited_image=None if made is None else made.edited_image,
                )
            )
        return found
