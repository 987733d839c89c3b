"""How far a stage is: one line that is rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from typing import TextIO

from ip2p_ray.report import duration
from ip2p_ray.stages.attempts import follow

logger = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
"""Seconds between two lines where the output is no terminal."""

WINDOW_S, WINDOW_COUNTS = 300.0, 8
"""The rate is that of so many last seconds or counts, whichever reaches further back."""


class Progress:
    """Counts of one stage, and what they say of the time that is left."""

    def __init__(
        self,
        stage: str,
        *,
        total: int,
        unit: str,
        done: int = 0,
        verdicts: Mapping[str | None, int] | None = None,
        more: Callable[[int], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`verdicts` count what was judged by earlier runs; `more` is told of each that is done."""
        self.stage, self.total, self.unit = stage, total, unit
        self.done = done
        self._before = Counter(verdicts or {})
        self.verdicts = self._before
        """What was judged, by the reason of rejects, and None for what was kept."""
        self.busy: Mapping[str, float] = {}
        """Seconds that actors of this run worked, by their class."""
        self._more = more
        self._clock = clock
        self._began = clock()
        self._counts: deque[tuple[float, int]] = deque()

    def update(self, done: int) -> None:
        """`done` of the total are finished, those of earlier runs included."""
        done = min(done, self.total)
        if done <= self.done:
            return
        if self._more is not None:
            self._more(done - self.done)
        self.done = done
        counts, now = self._counts, self._clock()
        counts.append((now, done))
        while len(counts) > WINDOW_COUNTS and now - counts[0][0] > WINDOW_S:
            counts.popleft()

    def heard(self, busy: Mapping[str, float], verdicts: Mapping[str | None, int]) -> None:
        """All that actors of this run told so far of their time, and of what they judged."""
        self.busy = busy
        self.verdicts = self._before + Counter(verdicts)

    def line(self) -> str:
        """For example "pairs: 32 of 96 triplets, 1.2 min so far, about 2.4 min left"."""
        now = self._clock()
        text = f"{self.stage}: {self.done:,} of {self.total:,} {self.unit}"
        text += f", {duration(now - self._began)} so far"
        left = self._left(now)
        return f"{text}, about {duration(left)} left" if left is not None else text

    def rate(self) -> float | None:
        """Units a second of late; None before it is known.

        Neither the start of the actors is in it nor, for long, what a run that goes on finds done.
        """
        return self._rate(self._clock())

    def _rate(self, now: float) -> float | None:
        if len(self._counts) < 2:
            return None
        began, done = self._counts[0]
        return (self.done - done) / max(now - began, 1e-9)

    def _left(self, now: float) -> float | None:
        """Seconds by the rate of late."""
        rate = self._rate(now)
        return None if rate is None or self.done == self.total else (self.total - self.done) / rate


@contextmanager
def shown(
    progress: Progress,
    poll: Callable[[], int],
    *,
    every_s: float = HEARTBEAT_S,
    poll_s: float = 1.0,
    screen: TextIO | None = None,
) -> Iterator[None]:
    """While the block runs, `poll` is asked now and then how much is done, and it is shown.

    On `screen` (by default stderr) where that is a terminal, else in the log.
    """
    stop = threading.Event()
    screen = screen or sys.stderr

    def show() -> None:
        terminal = screen.isatty()
        logged = time.monotonic()
        while not stop.wait(poll_s):
            progress.update(poll())
            if terminal:
                _rewrite(screen, progress.line())
            elif time.monotonic() - logged >= every_s:
                logged = time.monotonic()
                logger.info("%s", progress.line())
        if terminal:
            _rewrite(screen, "")

    follow(progress)
    # its lines are of the dataset that this thread works at
    thread = threading.Thread(target=copy_context().run, args=(show,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10.0)


def _rewrite(screen: TextIO, line: str) -> None:
    screen.write(f"\r\x1b[K{line}")
    screen.flush()
