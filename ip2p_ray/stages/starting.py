"""How Ray is started or found by a driver: silently, on this machine alone, and with patience."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services

from ip2p_ray.errors import StageError

PATIENCE_S = 120.0
"""Seconds in which the node of a local Ray has to say that it is there; Ray gives it 30."""


def start(*, local: bool, **options: Any) -> None:
    """`ray.init` with the options; a `local` Ray is one that it starts.

    Raises:
        StageError: a local one did not start in time.
    """
    with _silent_stderr(), _on_loopback(local), _patience():
        try:
            ray.init(**options)
        except Exception as error:
            if "during startup" not in str(error):
                raise
            raise StageError(
                f"Ray did not start in {PATIENCE_S:g} s: this machine is too busy, or lacks "
                "memory or disk; once that is mended the same command goes on"
            ) from error


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
def _patience() -> Iterator[None]:
    """Ray's question whether its node is there takes longer to be answered with no."""
    asked: Any = services.get_node

    def asking(*arguments: Any) -> Any:
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return asked(*arguments)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    services.get_node = asking
    try:
        yield
    finally:
        services.get_node = asked


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
