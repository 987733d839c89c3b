"""What the processes of a plan tell the one that shows it: counts, warnings, time, memory."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import ray

from ip2p_ray import logs
from ip2p_ray.stages.memory import own_peak_bytes
from ip2p_ray.stages.metrics import ActorMetrics

logger = logging.getLogger(__name__)

Verdicts = Callable[[pa.Table], Counter[str | None]]
"""Counts of what a table says was judged, by the reason of rejects; None for what was kept."""


class Known(NamedTuple):
    """What a Tally was told so far."""

    total: int
    """Counted."""
    warnings: tuple[str, ...]
    """Each once, in the order in which they came."""
    peaks: dict[str, int]
    """The most memory, in bytes, that a process of each name has had."""
    busy: dict[str, float]
    """Seconds that processes of each name worked, all together."""
    verdicts: Counter[str | None]
    """What they judged, by the reason of rejects; None for what was kept."""


@ray.remote(num_cpus=0)
class Tally:
    """Collects what processes tell, for the one that shows it."""

    def __init__(self) -> None:
        self._total = 0
        self._warnings: dict[str, None] = {}
        self._peaks: dict[str, int] = {}
        self._busy: dict[str, float] = defaultdict(float)
        self._verdicts = Counter[str | None]()

    def add(self, count: int) -> None:
        """So many more."""
        self._total += count

    def warn(self, text: str) -> None:
        """Something that a person should know; many processes may say the same."""
        self._warnings[text] = None

    def note(self, name: str, peak: int, busy_s: float) -> None:
        """The most bytes that a process of that name ever held, and seconds more that it worked."""
        self._peaks[name] = max(peak, self._peaks.get(name, 0))
        self._busy[name] += busy_s

    def judge(self, verdicts: Mapping[str | None, int]) -> None:
        """Verdicts more, by the reason of rejects; None for what was kept."""
        self._verdicts.update(verdicts)

    def known(self) -> Known:
        """All so far."""
        warnings, busy = tuple(self._warnings), dict(self._busy)
        return Known(self._total, warnings, self._peaks, busy, self._verdicts)


def watched(callable_class: type, judged: Verdicts | None = None) -> type:
    """The class of a plan's actors whose constructor takes a Tally too, `watching`.

    That is told this package's warnings, which would end in the log of a worker, and after each
    batch the memory of the process, the time that it worked, and the verdicts that `judged` finds
    in what comes out. The operator's metrics are too. `about` is what its log lines are of.
    """

    class Watched(callable_class):  # type: ignore[misc]
        def __init__(self, *, watching: Any, about: Mapping[str, str], **arguments: Any) -> None:
            logs.follow(**about, actor=callable_class.__name__)
            logging.getLogger("ip2p_ray").addHandler(Telling(watching))
            super().__init__(**arguments)
            self._watching = watching
            self._metrics = ActorMetrics(about.get("dataset", ""), callable_class.__name__)

        def __call__(self, batch: Any) -> Iterator[Any]:
            busy, verdicts = 0.0, Counter[str | None]()
            began = time.monotonic()
            made = super().__call__(batch)
            tables = made if isinstance(made, Iterator) else iter([made])
            while (table := next(tables, None)) is not None:
                seconds = time.monotonic() - began
                found = judged(table) if judged else Counter[str | None]()
                busy += seconds
                verdicts.update(found)
                self._metrics.worked(seconds)
                self._metrics.judged(found)
                yield table
                began = time.monotonic()
            logger.debug("a batch of %d rows took %.2f s", batch.num_rows, busy)
            peak = own_peak_bytes()
            self._watching.note.remote(callable_class.__name__, peak, busy)
            if verdicts:
                self._watching.judge.remote(dict(verdicts))
            self._metrics.memory()

    Watched.__name__ = Watched.__qualname__ = callable_class.__name__
    return Watched


class Telling(logging.Handler):
    """Sends warnings to an actor that shows them: to its method `warn`."""

    def __init__(self, shows: Any) -> None:
        super().__init__(logging.WARNING)
        self._shows = shows

    def emit(self, record: logging.LogRecord) -> None:
        """One more."""
        self._shows.warn.remote(self.format(record))
