"""What the processes of a plan tell the one that shows it: counts, warnings, their memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import ray

from ip2p_ray.stages.memory import own_peak_bytes


class Known(NamedTuple):
    """What a Tally was told so far."""

    total: int
    """Counted."""
    warnings: tuple[str, ...]
    """Each once, in the order in which they came."""
    peaks: dict[str, int]
    """The most memory, in bytes, that a process of each name has had."""


@ray.remote(num_cpus=0)
class Tally:
    """Collects what processes tell, for the one that shows it."""

    def __init__(self) -> None:
        self._total = 0
        self._warnings: dict[str, None] = {}
        self._peaks: dict[str, int] = {}

    def add(self, count: int) -> None:
        """So many more."""
        self._total += count

    def warn(self, text: str) -> None:
        """Something that a person should know; many processes may say the same."""
        self._warnings[text] = None

    def note_memory(self, name: str, peak: int) -> None:
        """The most memory, in bytes, that a process of that name has had."""
        self._peaks[name] = max(peak, self._peaks.get(name, 0))

    def known(self) -> Known:
        """All so far."""
        return Known(self._total, tuple(self._warnings), self._peaks)


def watched(callable_class: type) -> type:
    """The class of a plan's actors whose constructor takes a Tally too, `watching`.

    That is told this package's warnings, which would end in the log of a worker, and after each
    batch the memory of the process.
    """

    class Watched(callable_class):  # type: ignore[misc]
        def __init__(self, *, watching: Any, **arguments: Any) -> None:
            logging.getLogger("ip2p_ray").addHandler(_Telling(watching))
            super().__init__(**arguments)
            self._watching = watching

        def __call__(self, batch: Any) -> Iterator[Any]:
            made = super().__call__(batch)
            if isinstance(made, Iterator):
                yield from made
            else:
                yield made
            self._watching.note_memory.remote(callable_class.__name__, own_peak_bytes())

    Watched.__name__ = Watched.__qualname__ = callable_class.__name__
    return Watched


class _Telling(logging.Handler):
    def __init__(self, tally: Any) -> None:
        super().__init__(logging.WARNING)
        self._tally = tally

    def emit(self, record: logging.LogRecord) -> None:
        self._tally.warn.remote(self.format(record))
