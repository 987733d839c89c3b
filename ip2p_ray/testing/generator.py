"""A generator of candidates that makes up their scores: for tests of a search without tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ip2p_ray.candidates import CandidateRequest
from ip2p_ray.search.triplet import Made

Score = Callable[[CandidateRequest], Mapping[str, float]]


class ScriptedGenerator:
    """What `search.schedule` asks for candidates; each has the scores that a function gives it.

    Pictures are one pixel, whose value is the candidate's index. It remembers its batches.
    """

    def __init__(self, score: Score, predict: Score | None = None) -> None:
        self._score, self._predict = score, predict or score
        self.predicted: list[list[CandidateRequest]] = []
        """The candidates of each batch that went as far as pruning."""
        self.finished: list[list[CandidateRequest]] = []
        """The candidates of each batch that went to the end."""
        self.rows: list[int] = []
        """Rows of latents of each batch of either kind."""

    def predict(
        self, groups: Sequence[Sequence[CandidateRequest]]
    ) -> list[tuple[tuple[CandidateRequest, ...], list[Mapping[str, float]]]]:
        """The groups, and the scores of the second function."""
        self._remember(self.predicted, groups)
        return [(tuple(group), [self._predict(one) for one in group]) for group in groups]

    def take(
        self, begun: Sequence[CandidateRequest], places: Sequence[int]
    ) -> tuple[CandidateRequest, ...]:
        """The candidates at these places."""
        return tuple(begun[place] for place in places)

    def finish(
        self,
        groups: Sequence[Sequence[CandidateRequest]],
        begun: Sequence[Sequence[CandidateRequest] | None],
    ) -> list[Made]:
        """The scores of the first function.

        Raises:
            ValueError: what was begun is not what is to be finished.
        """
        for group, own in zip(groups, begun, strict=True):
            if own is not None and tuple(own) != tuple(group):
                raise ValueError(f"begun were {own}, to be finished are {group}")
        self._remember(self.finished, groups)
        return [self._made(one) for group in groups for one in group]

    def _remember(
        self, batches: list[list[CandidateRequest]], groups: Sequence[Sequence[CandidateRequest]]
    ) -> None:
        batches.append([one for group in groups for one in group])
        self.rows.append(sum(1 + len(group) for group in groups))

    def _made(self, request: CandidateRequest) -> Made:
        picture = np.full((1, 1, 3), request.index, np.uint8)
        return Made(
            similarities=self._score(request), source_image=picture, edited_image=picture + 100
        )
