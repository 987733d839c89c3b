"""Whoever wants to know how an engine fares."""

from __future__ import annotations

from typing import Literal

Stage = Literal["preparation", "admission", "steps", "decoding"]
"""Where a request's time goes: made ready, waiting for a place in the batch, in it, after it."""


class Observer:
    """Told of what an engine does, from the engine's own threads; this one does nothing."""

    def queued(self, waiting: int, running: int) -> None:
        """So many requests wait, and so many are in the batch, from now on."""

    def stepped(self, rows: int, most: int, seconds: float) -> None:
        """One step of `rows` requests out of at most `most` took so long."""

    def staged(self, stage: Stage, seconds: float) -> None:
        """One request is through a stage."""

    def looked_up(self, cache: Literal["text", "image"], found: bool) -> None:
        """One look into a cache."""
