"""An object that one process holds at a time, as a file's lock is held on disk.

It holds who writes it again and again. Who wants it while it is there watches: if it does not
change for long enough its holder is gone, killed perhaps, and it is taken over by a write that
fails if anybody else wrote meanwhile. Of a holder that is seen to have died, for it was a process
of the same machine, only what it had started elsewhere is waited for. A store that ignores the
conditions of a write (If-Match and If-None-Match) gives no lease, and lets everybody in.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ip2p_ray import objects, s3
from ip2p_ray.errors import Ip2pError, StageError, StorageError

_log = logging.getLogger(__name__)

BEAT_S = 5.0
"""How often a holder writes."""

GONE_S = 80.0
"""Without a write for so long, a holder is gone, and ends by itself if it is not.

As long as other requests are repeated (`s3.PATIENCE_S`), and a beat and a slow request more: a
store that is away for a minute ends no run.
"""

LINGERS_S = 20.0
"""What a process has started in a cluster, actors above all, is gone so long after its death."""

_LATER = 1.25
"""Who waits does so longer: by then the holder has ended."""


@contextlib.contextmanager
def held(
    uri: str, *, beat_s: float = BEAT_S, gone_s: float = GONE_S, lingers_s: float = LINGERS_S
) -> Iterator[None]:
    """The object at the URI for this process alone while the block runs in its main thread.

    A block whose lease is lost is interrupted, as by Ctrl-C: it must write no more.

    Raises:
        StageError: another process holds it, or has taken it over, or may have.
        StorageError: the bucket cannot be written to.
    """
    lease = _Lease(uri, gone_s)
    lease.take(beat_s, lingers_s)
    stop = threading.Event()

    def beat() -> None:
        pause = beat_s
        while not stop.wait(pause):
            try:
                with s3.impatient(BEAT_S):
                    lease.renew()
                pause = beat_s
            except Ip2pError as error:
                if pause == beat_s:
                    _log.warning("%s; trying again", error)
                pause = beat_s / 5

    def watch() -> None:  # beside it, because a request may take long
        pause = min(beat_s, gone_s) / 4
        while not stop.wait(pause):
            if lease.lost or time.monotonic() - lease.renewed > gone_s:
                lease.lost = True
                _interrupt()
                pause = gone_s / 4  # again, should somebody's code have swallowed it

    threads = [threading.Thread(target=work, daemon=True) for work in (beat, watch)]
    for thread in threads:
        thread.start()
    try:
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            lease.leave()
    except (KeyboardInterrupt, SystemExit):  # Ray Train makes the second of the first
        stop.set()  # the interruption may have come just as the block had ended
        if not lease.lost:
            raise
    if lease.lost:
        raise StageError(
            f"{uri} was taken over by another run, or could be, as this one did not reach it for "
            f"{gone_s:g} s; run the same command again when no other runs"
        )


def _interrupt() -> None:
    """Interrupts the main thread; in a process that ignores Ctrl-C, as a stop."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM if ignored else signal.SIGINT)


class _Lease:
    def __init__(self, uri: str, gone_s: float) -> None:
        self.lost = False
        self.renewed = time.monotonic()
        """When a write began that came through."""
        self._uri, self._gone_s = uri, gone_s
        self._me = secrets.token_hex(8)
        self._beats = itertools.count()
        self._tag: str | None = None

    def take(self, beat_s: float, lingers_s: float) -> None:
        seen, since, dead_since = None, math.inf, math.inf
        while not self._write(None):
            found = objects.read_tagged(self._uri)
            if found is not None:
                content, tag = found
                now = time.monotonic()
                if seen is None:
                    _log.info("%s is there: waiting whether its run is still alive", self._uri)
                    seen, since = tag, now
                elif tag != seen:
                    raise StageError(
                        f"another run is working in {self._uri.rpartition('/')[0]}; wait for it or "
                        "give another folder"
                    )
                dead_since = min(dead_since, now) if _died(content) else math.inf
                silent = now - since > _LATER * self._gone_s
                if (silent or now - dead_since >= lingers_s) and self._write(tag):
                    return
            time.sleep(min(beat_s, self._gone_s) / 4)

    def renew(self) -> None:
        if not self.lost and not self._write(self._tag):
            self.lost = True

    def leave(self) -> None:
        if self.lost:  # who takes it over waits for its silence
            return
        try:
            with s3.impatient(BEAT_S):
                found = objects.read_tagged(self._uri)
                self.lost = found is None or not self._is_ours(found[0])
                # a late deletion might meet the lock of whoever came after it
                if not self.lost and time.monotonic() - self.renewed < self._gone_s:
                    objects.remove([self._uri])
        except StorageError as error:
            _log.warning("%s; the next run waits until this lock is old", error)

    def _write(self, expected: str | None) -> bool:
        """Whether it is ours now; `expected` is the tag that is replaced, None for no object."""
        began, content = time.monotonic(), self._content()
        tag = objects.write_if(self._uri, content, expected)
        while tag is None:
            found = objects.read_tagged(self._uri)
            if found is None or not self._is_ours(found[0]):
                return False
            # an attempt that got no answer had come through, of this write or of one before
            there, tag_there = found
            tag = tag_there if there == content else objects.write_if(self._uri, content, tag_there)
        self._tag, self.renewed = tag, began
        return True

    def _content(self) -> bytes:
        return json.dumps({"holder": self._me, "beat": next(self._beats), **_place()}).encode()

    def _is_ours(self, content: bytes) -> bool:
        return f'"{self._me}"'.encode() in content


@cache
def _machine() -> str:
    """Where process numbers mean the same; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return " ".join([socket.gethostname(), boot, str(Path("/proc/self/ns/pid").readlink())])
    except OSError:
        return ""


def _started(process: int) -> str | None:
    """When the process was started, in the machine's ticks; None once it has ended.

    Raises:
        OSError: it cannot be seen.
    """
    behind_name = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2]
    state, *fields = behind_name.split()
    return None if state in "ZX" else fields[18]


def _place() -> dict[str, Any]:
    """This process, told from all others; nothing where that cannot be."""
    with contextlib.suppress(OSError):
        if _machine():
            process = os.getpid()
            return {"machine": _machine(), "process": process, "started": _started(process)}
    return {}


def _died(content: bytes) -> bool:
    """Whether the holder that wrote this was a process of this machine, and has ended."""
    try:
        told = json.loads(content)
        process = int(told["process"])
        if process < 1 or not _machine() or told["machine"] != _machine():
            return False
        os.kill(process, 0)
        return _started(process) != told["started"]
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return False
