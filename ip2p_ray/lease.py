"""An object that one process holds at a time, as a file's lock is held on disk.

It holds who writes it again and again. Who wants it while it is there watches: if it does not
change for long enough its holder is gone, killed perhaps, and it is taken over by a write that
fails if anybody else wrote meanwhile. A store that ignores the conditions of a write (If-Match and
If-None-Match) gives no lease, and lets everybody in.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ip2p_ray import objects
from ip2p_ray.errors import DatasetError, Ip2pError, StageError

_log = logging.getLogger(__name__)

BEAT_S = 5.0
"""How often a holder writes."""

GONE_S = 20.0
"""Without a write for so long, a holder is gone, and ends by itself if it is not."""

_LATER = 1.25
"""Who waits does so longer: by then the holder has ended."""


@contextmanager
def held(uri: str, *, beat_s: float = BEAT_S, gone_s: float = GONE_S) -> Iterator[None]:
    """The object at the URI for this process alone while the block runs in its main thread.

    A block whose lease is lost is interrupted, as by Ctrl-C: it must write no more.

    Raises:
        StageError: another process holds it, or has taken it over, or may have.
        StorageError: the bucket cannot be written to.
    """
    lease = _Lease(uri)
    lease.take(beat_s, gone_s)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(beat_s):
            try:
                with objects.impatient(BEAT_S):
                    lease.renew()
            except Ip2pError as error:
                _log.warning("%s", error)

    def watch() -> None:  # beside it, because a request may take long
        while not stop.wait(min(beat_s, gone_s) / 4):
            if lease.lost or time.monotonic() - lease.renewed > gone_s:
                lease.lost = True
                _interrupt()
                return

    threads = [threading.Thread(target=work, daemon=True) for work in (beat, watch)]
    for thread in threads:
        thread.start()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ray Train makes the second of the first
        if not lease.lost:
            raise
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        lease.leave()
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
    def __init__(self, uri: str) -> None:
        self.lost = False
        self.renewed = time.monotonic()
        """When a write began that came through."""
        self._uri = uri
        self._me = secrets.token_hex(8)
        self._beats = itertools.count()
        self._tag: str | None = None

    def take(self, beat_s: float, gone_s: float) -> None:
        seen, since = None, time.monotonic()
        while not self._write(None):
            tag = objects.tag(self._uri)
            if seen is None:
                _log.info("%s is there: waiting whether its run is still alive", self._uri)
                seen = tag
            if tag is not None and tag != seen:
                raise StageError(
                    f"another run is working in {self._uri.rpartition('/')[0]}; wait for it or "
                    "give another folder"
                )
            if time.monotonic() - since > _LATER * gone_s and tag is not None and self._write(tag):
                return
            time.sleep(min(beat_s, gone_s) / 4)

    def renew(self) -> None:
        if not self.lost and not self._write(self._tag):
            self.lost = True

    def leave(self) -> None:
        if self.lost:  # who takes it over waits for its silence
            return
        self.lost = not self._there().startswith(self._me.encode())
        if not self.lost:
            objects.remove([self._uri])

    def _write(self, expected: str | None) -> bool:
        """Whether it is ours now; `expected` is the tag that is replaced, None for no object."""
        began, content = time.monotonic(), f"{self._me} {next(self._beats)}".encode()
        tag = objects.write_if(self._uri, content, expected)
        if tag is None and self._there() == content:
            # an attempt that got no answer had come through
            tag = objects.tag(self._uri)
        if tag is not None:
            self._tag, self.renewed = tag, began
        return tag is not None

    def _there(self) -> bytes:
        try:
            return objects.read(self._uri)
        except DatasetError:
            return b""
