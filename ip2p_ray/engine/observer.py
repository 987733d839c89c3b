"""Whoever wants to know how an engine fares."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Literal

logger = logging.getLogger(__name__)

Stage = Literal["preparation", "admission", "steps", "decoding"]
"""Where a request's time goes: made ready, waiting for a place in the batch, in it, after it."""


class Observer:
    """Told of what an engine does, from the engine's own threads; this one does nothing."""

    def queued(self, waiting: int, running: int) -> None:
        """So many requests wait, and so many are in the batch, from now on."""

    def stepped(self, rows: int, most: float, seconds: float) -> None:
        """One step of `rows` requests out of at most `most` took so long."""

    def staged(self, stage: Stage, seconds: float) -> None:
        """One request is through a stage."""

    def looked_up(self, cache: Literal["text", "image"], found: bool) -> None:
        """One look into a cache."""


class Guarded(Observer):
    """Another observer, whose exceptions go to the log: no request is lost by them."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def queued(self, waiting: int, running: int) -> None:
        """See `Observer`, as for all that follow."""
        with _logged():
            self._observer.queued(waiting, running)

    def stepped(self, rows: int, most: float, seconds: float) -> None:
        """Of a step."""
        with _logged():
            self._observer.stepped(rows, most, seconds)

    def staged(self, stage: Stage, seconds: float) -> None:
        """Of a stage."""
        with _logged():
            self._observer.staged(stage, seconds)

    def looked_up(self, cache: Literal["text", "image"], found: bool) -> None:
        """Of a look into a cache."""
        with _logged():
            self._observer.looked_up(cache, found)


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.exception("an observer of the engine failed")
