"""What benchmarks measure with: time in turns, peak memory, arithmetic against a ceiling, facts.

Machines are noisy. Ways that are compared take turns, and their ratio is the median of the ratios
of turns that followed each other, not the ratio of two medians.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ip2p_ray.errors import ConfigError

Result = TypeVar("Result")

LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def facts(device: torch.device, libraries: Iterable[str] = LIBRARIES) -> dict[str, Any]:
    """Device, versions, threads, date and load: what a figure means nothing without."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
            **({"cuda": torch.version.cuda} if cuda else {}),
        },
    }


@dataclass(frozen=True)
class Seconds:
    """How long one piece of work took."""

    wall: float
    cpu: float
    """Of all threads of this process; on a busy machine steadier than the wall's."""


def timed(device: torch.device, work: Callable[[], Result]) -> tuple[Seconds, Result]:
    """The time until the device has done the work, and what it returned."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    synchronize(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result


def take_turns(
    device: torch.device, ways: Mapping[str, Callable[[], Result]], rounds: int
) -> tuple[dict[str, list[Seconds]], dict[str, Result]]:
    """The time of each way in each round (A B A B ...), and what the last turn returned."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    results: dict[str, Result] = {}
    for _ in range(rounds):
        for name, work in ways.items():
            took, results[name] = timed(device, work)
            seconds[name].append(took)
    return seconds, results


def median_ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """The median of the ratios of turns that followed each other."""
    return median(a / b for a, b in zip(above, below, strict=True))


def synchronize(device: torch.device) -> None:
    """Waits for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int | None:
    """The most memory that the work held at once beyond what was held before it.

    On CUDA that of torch's allocator; on a CPU the growth of the process's resident set, None where
    the system does not let it be reset (Linux does).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    # What glibc has kept of freed memory would hide that the work needs it again.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5", encoding="ascii")
        resident = _resident()
    except OSError:
        return None
    work()
    return max(0, _resident() - resident)


def matmul_flops(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """Operations a second of the fastest square matrix product: the ceiling of utilisation."""
    sizes = (2048, 4096, 8192) if device.type == "cuda" else (256, 512, 1024)
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        torch.mm(left, right)
        synchronize(device)
        repeats = max(1, 2**30 // size**3) * (8 if device.type == "cuda" else 1)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            took, _ = timed(device, partial(_multiply, left, right, repeats))
            best = max(best, 2 * size**3 * repeats / took.wall)
    return best


def count_flops(work: Callable[[], object]) -> int:
    """Operations of all matrix products and convolutions of the work (a product and sum are 2)."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def _multiply(left: Tensor, right: Tensor, repeats: int) -> None:
    for _ in range(repeats):
        torch.mm(left, right)


def _resident() -> int:
    """The largest resident set, in bytes, since it was reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text("ascii"))
    if found is None:
        raise OSError(f"{_STATUS} has no VmHWM")
    return int(found[1]) * 1024


def _processor() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text("utf-8")
        if found := re.search(r"model name\s*:\s*(.+)", text):
            return found[1].strip()
    return platform.processor() or platform.machine()


def ratio(ours: float | None, reference: float | None) -> float | None:
    """Ours by the reference's, None where either is not known."""
    return None if ours is None or not reference else ours / reference


def cell(value: float | None, factor: float, form: str) -> str:
    """A figure in a table, "-" where it is not known."""
    return "-" if value is None else format(value * factor, form)


def device_named(name: str) -> torch.device:
    """The device of a flag.

    Raises:
        ConfigError: there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is not one that torch knows") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch sees no CUDA device here")
    return device
