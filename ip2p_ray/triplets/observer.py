"""Whoever wants to know how requests to a language model fare."""

from __future__ import annotations

from ip2p_ray.triplets.limits import Usage


class Observer:
    """Told of what becomes of requests for replies; this one does nothing."""

    def answered(self, usage: Usage) -> None:
        """One had a reply, of so many tokens."""

    def failed(self, kind: str) -> None:
        """One had none: status_<number>, timeout, connection or malformed."""
