"""Work that threads do ahead of whoever waits for it, in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """Hands out what was made of each item, in the items' order."""

    def __init__(self, made: Iterator[Made]) -> None:
        self._made = made
        self.waited = 0.0
        """Seconds that `next` has waited since it was last set to 0."""

    def next(self) -> Made:
        """What was made of the next item; an error of its making is raised here."""
        began = time.perf_counter()
        try:
            return next(self._made)
        finally:
            self.waited += time.perf_counter() - began


@contextmanager
def made_ahead(
    make: Callable[[Item], Made], items: Iterable[Item], *, threads: int = 1, depth: int = 2
) -> Iterator[Ahead[Made]]:
    """While the block runs, `threads` make of the items, at most `depth` ahead of `next`."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")

    def made() -> Iterator[Made]:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield Ahead(made())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
