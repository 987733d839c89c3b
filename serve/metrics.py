"""What an operator sees: Prometheus metrics through Ray, from replicas and from the front.

Every name gets Ray's prefix `ray_`; cluster/grafana/editor.json draws them.
"""

from __future__ import annotations

from typing import Literal

from ray.util.metrics import Counter, Gauge, Histogram

from ip2p_ray.engine import Observer
from ip2p_ray.engine.observer import Stage
from serve.counting import Counting

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 300.0]
"""Bounds of the histograms of seconds."""
SHARES = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
"""Bounds of the histogram of a batch's fill; above 1 nothing is."""


class ReplicaMetrics(Observer):
    """Of an engine."""

    def __init__(self) -> None:
        self._waiting = Gauge("ip2p_waiting", "Requests that wait for a place in the batch.")
        self._running = Gauge("ip2p_running", "Requests in the batch or being decoded.")
        self._fill = Histogram(
            "ip2p_batch_fill", "Share of the batch's places that a step used.", boundaries=SHARES
        )
        self._step = Histogram("ip2p_step_seconds", "Of one step of a batch.", boundaries=SECONDS)
        self._stage = Histogram(
            "ip2p_stage_seconds",
            "Of one request in a stage of the engine.",
            boundaries=SECONDS,
            tag_keys=("stage",),
        )
        self._cache = Counter(
            "ip2p_cache_lookups", "Looks for an encoded text or image.", tag_keys=("cache", "found")
        )

    def queued(self, waiting: int, running: int) -> None:
        """See `Observer`, as for all that follow."""
        self._waiting.set(waiting)
        self._running.set(running)

    def stepped(self, rows: int, most: float, seconds: float) -> None:
        """Fill and time of a step."""
        self._fill.observe(rows / most)
        self._step.observe(seconds)

    def staged(self, stage: Stage, seconds: float) -> None:
        """Time in a stage."""
        self._stage.observe(seconds, tags={"stage": stage})

    def looked_up(self, cache: Literal["text", "image"], found: bool) -> None:
        """Whether a cache helped."""
        self._cache.inc(1, tags={"cache": cache, "found": str(found).lower()})


class FrontMetrics(Counting):
    """Of the HTTP front."""

    def __init__(self) -> None:
        self._answers = Histogram(
            "ip2p_answer_seconds",
            "From a request to its answer, or to the end of its stream.",
            boundaries=SECONDS,
            tag_keys=("path", "status"),
        )
        self._rejects = Counter(
            "ip2p_rejects", "Requests that were refused or failed.", tag_keys=("reason",)
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        """See `Counting`; paths that nobody serves are counted as one."""
        known = path in ("/v1/images/edits", "/v1/models", "/healthz", "/readyz", "/")
        tags = {"path": path if known else "other", "status": str(status)}
        self._answers.observe(seconds, tags=tags)

    def refused(self, reason: str) -> None:
        """One more of this reason."""
        self._rejects.inc(1, tags={"reason": reason})
