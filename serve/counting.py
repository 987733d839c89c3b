"""What the HTTP front counts; this one counts nothing."""

from __future__ import annotations


class Counting:
    """Told of every answer."""

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request was answered, or its stream was begun."""

    def refused(self, reason: str) -> None:
        """A request was refused, or failed."""
