"""How much memory a run takes: of its driver, of its actors, in Ray's object store."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import ray

from ip2p_ray.report import size

DRIVER, OBJECT_STORE = "driver", "object store"


@contextmanager
def peak_memory(every_s: float = 5.0) -> Iterator[dict[str, int]]:
    """The largest resident memory of this process while the block runs, under DRIVER, in bytes.

    And under OBJECT_STORE the most that lay in Ray's. Both are looked at every so many seconds.
    """
    peak = {DRIVER: 0, OBJECT_STORE: 0}
    process, stop = psutil.Process(), threading.Event()

    def look() -> None:
        peak[DRIVER] = max(peak[DRIVER], process.memory_info().rss)
        if ray.is_initialized():
            peak[OBJECT_STORE] = max(peak[OBJECT_STORE], _object_store_bytes())

    def watch() -> None:
        while not stop.wait(every_s):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        look()


def own_peak_bytes() -> int:
    """The largest resident memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_line(peaks: Mapping[str, int]) -> str:
    """For example "driver 301.0 MB, object store 12.0 MB, GenerateCandidates 1.2 GB"."""
    return ", ".join(f"{name} {size(count)}" for name, count in peaks.items())


def _object_store_bytes() -> int:
    name = "object_store_memory"
    have, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
    return int(have.get(name, 0) - free.get(name, 0))
