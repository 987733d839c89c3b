"""What an operator sees of the stages: Prometheus metrics through Ray, from drivers and actors.

Every name gets Ray's prefix `ray_`, counters the suffix `_total`; cluster/grafana/pipeline.json
draws them. Ray adds labels of the node and of the process, so a sum over them is that of a cluster.

A counter counts work done, by a process since it began. After a kill the same rows may be worked at
again, and are counted again; what is kept, each row once, is in manifests. What a run that goes on
finds done already is not counted. Ray goes on showing what a process counted after its end, until
its node goes; of gauges only those of processes that live.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache

import psutil
import ray
from ray.util.metrics import Counter, Gauge, Histogram

from ip2p_ray import logs
from ip2p_ray.notes import Note
from ip2p_ray.report import Report
from ip2p_ray.triplets.limits import LimitsConfig, Usage
from ip2p_ray.triplets.observer import Observer

SHARES = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
"""Bounds of the histogram of a batch's fill; above 1 nothing is."""

KEPT = "kept"
"""In the place of a reason, of what was not rejected."""

JUDGED_BY_ACTORS = ("candidates", "replies")
"""Datasets whose verdicts are counted as they fall; of others, once the dataset is whole."""

_MEMORY_EVERY_S = 5.0


@cache
def _rows() -> Counter:
    return Counter("ip2p_dataset_rows", "Rows of a dataset that were made.", ("dataset",))


@cache
def _verdicts() -> Counter:
    return Counter(
        "ip2p_dataset_verdicts",
        "Rows, of candidates the candidates, that were judged, by the reason of rejects.",
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


def progressed(note: Note | None) -> None:
    """How far the dataset that is made is, by its driver."""
    if note is None or note.done is None or not note.total:
        return
    tags = {"dataset": logs.names().get("dataset", "")}
    _share().set(note.done / note.total, tags=tags)
    left = note.total - note.done
    if note.rate or not left:
        _left().set(left / note.rate if left and note.rate else 0.0, tags=tags)


def judged(dataset: str, verdicts: Mapping[str | None, int] | Mapping[str, int]) -> None:
    """Verdicts, by the reason of rejects; None for what was kept."""
    for reason, count in verdicts.items():
        if count:
            _verdicts().inc(count, tags={"dataset": dataset, "reason": reason or KEPT})


def reported(report: Report) -> None:
    """The verdicts of a dataset that is whole, unless its actors counted them."""
    if ray.is_initialized() and report.stage not in JUDGED_BY_ACTORS:
        judged(report.stage, {KEPT: report.rows_out})
        judged(report.stage, report.rejected)


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


class TrainingMetrics:
    """Of one worker of training; what is of the whole run, the first of them tells."""

    def __init__(self, rank: int, workers: int, batch_size: int) -> None:
        self._rank, self._workers, self._batch_size = rank, workers, batch_size
        self._actor = ActorMetrics("checkpoints", "train_on_worker")
        self._step = Gauge("ip2p_training_step", "Optimizer steps done.")
        self._loss = Gauge("ip2p_training_loss", "Of the last step, over the whole batch.")
        self._of = Gauge("ip2p_training_workers", "Workers that train together.")
        self._images = Counter("ip2p_training_images", "Samples that were trained on.")
        self._waited = Counter(
            "ip2p_training_wait_seconds", "Seconds that the first worker waited for data."
        )
        self._saved = Counter("ip2p_training_checkpoint_seconds", "Seconds for checkpoints.")

    def stepped(self, step: int, loss: float, seconds: float, waited: float) -> None:
        """One optimizer step."""
        self._actor.worked(seconds)
        self._actor.memory()
        if self._rank:
            return
        self._step.set(step)
        self._loss.set(loss)
        self._of.set(self._workers)
        self._images.inc(self._batch_size)
        if waited > 0:
            self._waited.inc(waited)

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long, its copy in a bucket included."""
        self._saved.inc(max(seconds, 1e-9))


class WriterMetrics(Observer):
    """Of one process that asks an endpoint for replies."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._requests = Counter(
            "ip2p_writer_requests",
            "Requests to the language model, by what came of them.",
            ("outcome",),
        )
        self._tokens = Counter(
            "ip2p_writer_tokens", "Tokens that the model read and wrote.", ("direction",)
        )
        self._usd = Counter("ip2p_writer_usd", "US dollars, by the prices that the job was given.")

    def answered(self, usage: Usage) -> None:
        """See `Observer`, as for what follows."""
        self._requests.inc(1, tags={"outcome": "answered"})
        for direction, tokens in (
            ("read", usage.prompt_tokens),
            ("written", usage.completion_tokens),
        ):
            if tokens:
                self._tokens.inc(tokens, tags={"direction": direction})
        if spent := self._limits.usd(usage):
            self._usd.inc(spent)

    def failed(self, kind: str) -> None:
        """A request without a reply."""
        self._requests.inc(1, tags={"outcome": kind})


def _holds_gpu() -> bool:
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return False
    import torch  # whoever holds a GPU computes with it; the others need not wait for torch

    return torch.cuda.is_available()
