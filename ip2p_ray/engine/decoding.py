"""The thread that decodes: whoever is done first, then previews of whoever still runs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from ip2p_ray.engine.row import Row

logger = logging.getLogger(__name__)


class Decoding:
    """One thread for work on rows; that of one row is done in the order in which it was given.

    Rows that have taken their last step come before others, so that previews, of which one row
    may want many, hold nobody else up.
    """

    def __init__(self) -> None:
        self._work: deque[tuple[Row, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine-decoding", daemon=True)
        self._thread.start()

    def submit(self, row: Row, work: Callable[[], None]) -> None:
        """Does the work soon; what it raises goes to the log."""
        with self._changed:
            self._work.append((row, work))
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after all that was given is done."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work or self._closing)
                if not self._work:
                    return
                first = next((each for each in self._work if each[0].arrived), self._work[0])
                self._work.remove(first)
            try:
                first[1]()
            except Exception:
                logger.exception("a preview was not shown")
