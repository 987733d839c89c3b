"""What an operator sees of the stages: Prometheus metrics through Ray, from drivers and actors.

Every name gets Ray's prefix `ray_`, counters the suffix `_total`; cluster/grafana/pipeline.json
draws them. Ray adds labels of the node and of the process, so a sum over them is that of a cluster.

A counter counts work done, by this process, since it began. After a kill the same rows may be
worked at again, and are counted again; what is kept, each row once, is in manifests. What a run
that goes on finds done already is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache

import psutil
import ray
from ray.util.metrics import Counter, Gauge, Histogram

from ip2p_ray import logs
from ip2p_ray.report import Report

SHARES = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
"""Bounds of the histogram of a batch's fill; above 1 nothing is."""

JUDGED_BY_ACTORS = ("candidates", "replies")
"""Datasets whose verdicts are counted as they fall; of others, once the dataset is whole."""

_MEMORY_EVERY_S = 5.0


@cache
def _rows() -> Counter:
    return Counter("ip2p_dataset_rows", "Rows of a dataset that were made.", ("dataset",))


@cache
def _kept() -> Counter:
    return Counter(
        "ip2p_dataset_kept",
        "Rows, of candidates the candidates, that were judged and kept.",
        ("dataset",),
    )


@cache
def _rejects() -> Counter:
    return Counter(
        "ip2p_dataset_rejects",
        "Rows, of candidates the candidates, that were judged and rejected.",
        ("dataset", "reason"),
    )


@cache
def _busy() -> Counter:
    return Counter(
        "ip2p_device_seconds",
        "Seconds that an actor worked, by the kind of device that it holds.",
        ("dataset", "actor", "device"),
    )


@cache
def _fill() -> Histogram:
    return Histogram(
        "ip2p_generator_fill",
        "Share of the places of a generator's batch that were used.",
        boundaries=SHARES,
        tag_keys=("dataset",),
    )


def filled(rows: int, places: int) -> None:
    """A batch of so many rows was made where there are so many places, for this dataset."""
    _fill().observe(rows / places, tags={"dataset": logs.names().get("dataset", "")})


def rows_made(dataset: str, count: int) -> None:
    """So many rows more, by a driver."""
    _rows().inc(count, tags={"dataset": dataset})


@cache
def _share() -> Gauge:
    return Gauge("ip2p_dataset_share", "Share of a dataset's rows that are made.", ("dataset",))


@cache
def _left() -> Gauge:
    return Gauge("ip2p_dataset_left_seconds", "Time left, by the rate of late.", ("dataset",))


def progressed(dataset: str, done: int, total: int, rate: float | None) -> None:
    """How far a dataset is, by its driver."""
    tags = {"dataset": dataset}
    _share().set(done / total if total else 1.0, tags=tags)
    if rate:
        _left().set((total - done) / rate, tags=tags)


def judged(dataset: str, verdicts: Mapping[str | None, int]) -> None:
    """Verdicts, by the reason of rejects; None for what was kept."""
    for reason, count in verdicts.items():
        if not count:
            continue
        if reason is None:
            _kept().inc(count, tags={"dataset": dataset})
        else:
            _rejects().inc(count, tags={"dataset": dataset, "reason": reason})


def reported(report: Report) -> None:
    """The verdicts of a dataset that is whole, unless its actors counted them."""
    if ray.is_initialized() and report.stage not in JUDGED_BY_ACTORS:
        judged(report.stage, {None: report.rows_out, **report.rejected})


class ActorMetrics:
    """Of one process that works at a dataset, on the device that Ray gave it."""

    def __init__(self, dataset: str, actor: str) -> None:
        self._dataset = {"dataset": dataset}
        self._actor = {**self._dataset, "actor": actor}
        self._device = "cuda" if _holds_gpu() else "cpu"
        self._looked = 0.0
        self._memory = Gauge(
            "ip2p_actor_memory_bytes", "Resident memory of a process.", ("dataset", "actor")
        )
        self._device_memory = Gauge(
            "ip2p_device_memory_bytes",
            "Memory of a process's device: the most that it allocated and reserved so far, and "
            "what is free.",
            ("dataset", "actor", "kind"),
        )

    def worked(self, seconds: float) -> None:
        """So many seconds more."""
        _busy().inc(max(seconds, 1e-9), tags={**self._actor, "device": self._device})

    def judged(self, verdicts: Mapping[str | None, int]) -> None:
        """See `judged`."""
        judged(self._dataset["dataset"], verdicts)

    def memory(self) -> None:
        """Looks at the memory, unless that was just done."""
        if time.monotonic() - self._looked < _MEMORY_EVERY_S:
            return
        self._looked = time.monotonic()
        self._memory.set(psutil.Process().memory_info().rss, tags=self._actor)
        if self._device == "cuda":
            import torch

            free, _ = torch.cuda.mem_get_info()
            for kind, count in (
                ("allocated", torch.cuda.max_memory_allocated()),
                ("reserved", torch.cuda.max_memory_reserved()),
                ("free", free),
            ):
                self._device_memory.set(count, tags={**self._actor, "kind": kind})


def _holds_gpu() -> bool:
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return False
    import torch  # whoever holds a GPU computes with it; the others need not wait for torch

    return torch.cuda.is_available()
