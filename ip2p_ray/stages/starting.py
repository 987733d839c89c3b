"""How a driver starts Ray or finds it: silently, on this machine alone, again if need be."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants

from ip2p_ray.errors import StageError

ATTEMPTS = 4
"""Ray gives its node 30 s, and its agent, by whose absence the node dies, 15."""

_LATE = ("timed out during startup", "Timed out waiting for file", "Failed to start GCS")

logger = logging.getLogger(__name__)


def start(*, local: bool, **options: Any) -> None:
    """`ray.init` with the options; a `local` Ray is one that it starts.

    One that does not start in time is started again. What it left is ended first, as far as this
    process's new children go: no other thread should start any meanwhile.

    Raises:
        StageError: a local one did not start in time, several times.
    """
    for attempt in range(1, ATTEMPTS + 1):
        before = _children()
        try:
            with _silent_stderr(), _on_loopback(local):
                ray.init(**options)
            return
        except Exception as error:
            if not local or not is_late(error):
                raise
            # a second one beside what is left of the first would be slower still
            _end(_children() - before)
            if attempt == ATTEMPTS:
                raise StageError(
                    f"Ray did not start in {ATTEMPTS} attempts: this machine is too busy, or lacks "
                    "memory or disk; once that is mended the same command goes on"
                ) from error
            logger.info("Ray did not start in time; once more")


def is_late(error: Exception) -> bool:
    """Whether it says that a node did not start in time."""
    return any(late in str(error) for late in _LATE)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@contextmanager
def _on_loopback(wanted: bool) -> Iterator[None]:
    """A Ray that starts in the block is 127.0.0.1, as Ray has it on Windows and macOS.

    Elsewhere it takes the machine's address in the network, where there is one, even of
    `_node_ip_address`, and then all of its processes listen on every address.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and not wanted
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what Ray's C++ parts write to this process's stderr while they start."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
