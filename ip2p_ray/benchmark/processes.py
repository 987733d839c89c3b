"""What a program's processes cost while it runs: CPU time and memory, by what each of them does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil


@dataclass(frozen=True)
class Sample:
    """CPU time that was used up to a moment."""

    at: float
    """Of the machine's monotonic clock, in seconds."""
    cpu: dict[str, float]
    """Seconds by role."""


@dataclass
class Cost:
    """What was seen of the processes."""

    samples: list[Sample] = field(default_factory=list)
    rss: dict[str, int] = field(default_factory=dict)
    """Most bytes in memory, by role, of the largest process of that role."""
    own: dict[str, int] = field(default_factory=dict)
    """The same without what is shared with others, such as Ray's object store."""
    others_cores: float = 0.0
    """Cores that the rest of the machine kept busy, on average."""

    def cpu(self, began: float, ended: float) -> dict[str, float]:
        """Seconds of CPU time between two moments, by role."""
        first, last = self._near(began), self._near(ended)
        return {role: used - first.cpu.get(role, 0.0) for role, used in last.cpu.items()}

    def _near(self, at: float) -> Sample:
        return min(self.samples, key=lambda sample: abs(sample.at - at))


@contextmanager
def watched(
    roots: dict[int, str], role: Callable[[str], str], *, every_s: float = 0.5
) -> Iterator[Cost]:
    """The cost, while the block runs, of processes and of all below them; it grows meanwhile.

    `roots` has the role of each process by its id; `role` says that of the others by their names.
    Processes that live for less than `every_s` may be missed.
    """
    watch = _Watch(roots, role)
    stop = threading.Event()

    def look_now_and_then() -> None:
        while not stop.wait(every_s):
            watch.look()

    watch.look()
    busy, began = _busy(), time.monotonic()
    thread = threading.Thread(target=look_now_and_then, daemon=True)
    thread.start()
    try:
        yield watch.cost
    finally:
        stop.set()
        thread.join()
        watch.look()
        ours = sum(watch.cost.samples[-1].cpu.values()) - sum(watch.cost.samples[0].cpu.values())
        seconds = time.monotonic() - began
        watch.cost.others_cores = max(0.0, (_busy() - busy - ours) / seconds)


class _Watch:
    def __init__(self, roots: dict[int, str], role: Callable[[str], str]) -> None:
        self.cost = Cost()
        self._roots, self._role = roots, role
        self._cpu: dict[tuple[int, float], tuple[str, float]] = {}

    def look(self) -> None:
        for process in self._processes():
            with suppress(psutil.Error), process.oneshot():
                role = self._roots.get(process.pid) or self._role(process.name())
                times, memory = process.cpu_times(), process.memory_info()
                key = process.pid, process.create_time()
                self._cpu[key] = role, times.user + times.system
                own = memory.rss - getattr(memory, "shared", 0)
                self.cost.rss[role] = max(self.cost.rss.get(role, 0), memory.rss)
                self.cost.own[role] = max(self.cost.own.get(role, 0), own)
        cpu: dict[str, float] = {}
        for role, seconds in self._cpu.values():
            cpu[role] = cpu.get(role, 0.0) + seconds
        self.cost.samples.append(Sample(time.monotonic(), cpu))

    def _processes(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for pid in self._roots:
            with suppress(psutil.Error):
                root = psutil.Process(pid)
                found += [root, *root.children(recursive=True)]
        return found


def _busy() -> float:
    """Seconds that all cores together have worked since the machine was started."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)
