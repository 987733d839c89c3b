"""Candidates as rows of a batch: what is asked for, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ip2p_ray.diffusion.sample import Progress
from ip2p_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CandidateRequest:
    """One candidate that is to be made."""

    triplet_key: str
    """Whose candidate it is."""
    index: int
    """Which of the triplet's candidates, from 0."""
    caption: str
    """Text of the source image."""
    edited_caption: str
    """Text of the edited image."""
    seed: int
    """Of the noise both pictures share, in [0, 2**63)."""
    self_replace: float
    """Fraction of the steps, in [0, 1], that take the source's self-attention."""
    guidance_scale: float
    """Of both pictures."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidates:
    """Candidates between two steps; their rows can leave a batch and go on in another one.

    Going on draws from the generators, so one and the same of these is gone on from only once.
    """

    requests: tuple[CandidateRequest, ...]
    source: tuple[int, ...]
    """Which of the sources each request follows; see `prompt_to_prompt.control`."""
    rows: Progress
    """Latents of the sources, then of the edited pictures."""
    generators: tuple[torch.Generator, ...]
    """One a row."""
    step: int
    """How many steps are done."""

    @property
    def sources(self) -> int:
        """How many sources there are."""
        return len(self.generators) - len(self.requests)

    def split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Of row-wise latents: those of the sources, and those of the edited pictures."""
        return latents[: self.sources], latents[self.sources :]

    def take(self, places: Sequence[int]) -> Candidates:
        """The candidates at these places, with the sources that they follow."""
        kept = list(dict.fromkeys(self.source[place] for place in places))
        rows = [*kept, *(self.sources + place for place in places)]
        return replace(
            self,
            requests=tuple(self.requests[place] for place in places),
            source=tuple(kept.index(self.source[place]) for place in places),
            rows=self.rows.take(rows),
            generators=tuple(self.generators[row] for row in rows),
        )

    @staticmethod
    def join(parts: Sequence[Candidates]) -> Candidates:
        """The candidates of all parts, one part after the other.

        Raises: ConfigError unless all are at the same step.
        """
        steps = sorted({part.step for part in parts})
        if len(steps) != 1:
            raise ConfigError(f"the rows of a batch are at one step, got {steps}")
        sources: list[int] = []
        edited: list[int] = []
        source: list[int] = []
        first = 0
        for part in parts:
            source += [len(sources) + own for own in part.source]
            sources += range(first, first + part.sources)
            edited += range(first + part.sources, first + len(part.generators))
            first += len(part.generators)
        generators = [generator for part in parts for generator in part.generators]
        return Candidates(
            requests=tuple(request for part in parts for request in part.requests),
            source=tuple(source),
            rows=Progress.join([part.rows for part in parts]).take(sources + edited),
            generators=tuple(generators[row] for row in sources + edited),
            step=steps[0],
        )
