"""A log line a minute of work that takes long."""

from __future__ import annotations

import logging
import time

from ip2p_ray.miniature import parallel

logger = logging.getLogger(__name__)

EVERY_S = 60.0


class Pace:
    """Logs how far the work is, a line a minute and one at the end; only in the first process."""

    def __init__(self, name: str, total: int, *, unit: str, done: int = 0) -> None:
        self.name, self.total, self.unit = name, total, unit
        self._first = done
        self._began = self._logged = time.monotonic()

    def tick(self, done: int, detail: str = "") -> None:
        """`done` of the total are finished, those of earlier runs included."""
        now = time.monotonic()
        if parallel.rank() or (now - self._logged < EVERY_S and done < self.total):
            return
        self._logged = now
        new = done - self._first
        left = (now - self._began) / new * (self.total - done) / 60 if new > 0 else 0.0
        logger.info(
            "%s: %s %d of %d%s, %.0f min left",
            self.name, self.unit, done, self.total, f", {detail}" if detail else "", left,
        )  # fmt: skip
