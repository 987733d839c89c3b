"""What a program's processes cost while it runs: CPU time and memory, by what each of them does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil

Key = tuple[int, float]
"""A process: its id and the time at which it was made."""


@dataclass(frozen=True)
class Sample:
    """CPU time that was used up to a moment."""

    at: float
    """Of the machine's monotonic clock, in seconds."""
    cpu: dict[Key, float]
    """Seconds by process, of those that have ended too."""


@dataclass
class Cost:
    """What was seen of the processes."""

    samples: list[Sample] = field(default_factory=list)
    roles: dict[Key, str] = field(default_factory=dict)
    """What each process does, by all that is known of it until now."""
    most: dict[Key, tuple[int, int]] = field(default_factory=dict)
    """Most bytes of each in memory, and most without what is shared with others."""
    others_cores: float = 0.0
    """Cores that the rest of the machine kept busy, on average."""

    @property
    def rss(self) -> dict[str, int]:
        """Most bytes in memory, by role, of the largest process of that role."""
        return self._largest(0)

    @property
    def own(self) -> dict[str, int]:
        """The same without what is shared with others, such as Ray's object store."""
        return self._largest(1)

    def cpu(self, began: float, ended: float) -> dict[str, float]:
        """Seconds of CPU time between two moments, by role."""
        first, last = self._near(began), self._near(ended)
        found: dict[str, float] = {}
        for key, used in last.cpu.items():
            role = self.roles[key]
            found[role] = found.get(role, 0.0) + used - first.cpu.get(key, 0.0)
        return found

    def _near(self, at: float) -> Sample:
        return min(self.samples, key=lambda sample: abs(sample.at - at))

    def _largest(self, which: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for key, most in list(self.most.items()):  # others are found meanwhile
            role = self.roles[key]
            found[role] = max(found.get(role, 0), most[which])
        return found


@contextmanager
def watched(
    roots: dict[int, str], role: Callable[[Set[str]], str], *, every_s: float = 0.5
) -> Iterator[Cost]:
    """The cost, while the block runs, of processes and of all below them; it grows meanwhile.

    `roots` has the role of each process by its id; `role` says that of another by all the names
    that it has had: one that starts, idles or has just ended may not be called what it does.
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
        first, last = watch.cost.samples[0].cpu, watch.cost.samples[-1].cpu
        ours = sum(last.values()) - sum(first.values())
        seconds = time.monotonic() - began
        watch.cost.others_cores = max(0.0, (_busy() - busy - ours) / seconds)


class _Watch:
    def __init__(self, roots: dict[int, str], role: Callable[[Set[str]], str]) -> None:
        self.cost = Cost()
        self._roots, self._role = roots, role
        self._names: dict[Key, set[str]] = {}
        self._cpu: dict[Key, float] = {}

    def look(self) -> None:
        for process in self._processes():
            with suppress(psutil.Error), process.oneshot():
                key = process.pid, process.create_time()
                times, memory = process.cpu_times(), process.memory_info()
                names = self._names.setdefault(key, set())
                names.add(process.name())
                self.cost.roles[key] = self._roots.get(process.pid) or self._role(names)
                self._cpu[key] = times.user + times.system
                rss, own = self.cost.most.get(key, (0, 0))
                private = memory.rss - getattr(memory, "shared", 0)
                self.cost.most[key] = max(rss, memory.rss), max(own, private)
        self.cost.samples.append(Sample(time.monotonic(), dict(self._cpu)))

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
