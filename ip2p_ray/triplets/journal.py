"""Replies on disk the moment they arrive, so that none that is there is paid for again.

A journal is a folder; each process that writes has a file of its own in it, and all read all
files. A record is one line of JSON with a checksum at its end. A file is only ever appended to, and
a reply counts from the moment it is on disk: whenever a process is killed, at most its last line is
cut, and no reader takes a cut line for a record. A journal in a store of objects (`shelf`) is the
same but for the moment: there a reply counts once it is put, which is done at most every second. So
a kill costs at most what was in flight, and of a store what was not put yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import queue
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ip2p_ray.errors import ConfigError, DatasetError, Ip2pError, StageError
from ip2p_ray.places import Places
from ip2p_ray.schema import reply_key
from ip2p_ray.triplets.limits import NOTHING, Usage
from ip2p_ray.triplets.reply import Reply
from ip2p_ray.triplets.shelf import FolderShelf, Shelf, Store, StoreShelf

_log = logging.getLogger(__name__)

# {"key":"<32 hex digits>", ... ,"checksum":"<16 hex digits>"}, the checksum over all before it
_KEY_START = b'{"key":"'
_KEY = slice(len(_KEY_START), len(_KEY_START) + 32)
_CHECKSUM_START = b',"checksum":"'
_TAIL = len(_CHECKSUM_START) + 16 + len(b'"}')
_OFFSET_BITS = 40  # a part of a journal is below a terabyte


class Journal:
    """Replies by key, in a folder or store that several processes may write to at the same time.

    Thread-safe. In memory are the `Places` of the records. Of two records of one key the later
    holds: by the start of the process that wrote it, then by place.
    """

    def __init__(self, place: str | Path | Store) -> None:
        self._shelf: Shelf = (
            FolderShelf(Path(place)) if isinstance(place, str | Path) else StoreShelf(place)
        )
        self._parts: list[str] = []
        self._numbers: dict[str, int] = {}
        self._read_up_to: dict[str, int] = {}
        self._places = Places()
        self._corrupt = 0
        self._seen = 0
        self._reading = threading.Lock()
        self._pen = _Pen(self._shelf)

    @property
    def flush_s(self) -> float:
        """Seconds that a reply waits at most before it is written; 0 on disk."""
        return self._shelf.every_s

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many keys have a reply."""
        self._refresh()
        return len(self._places)

    @property
    def corrupt(self) -> int:
        """Whole lines that are no records; a last line that was cut is none of them."""
        self._refresh()
        return self._corrupt

    def get(self, key: str) -> Reply | None:
        """The reply of a key, from whichever process; None if none is on disk."""
        digest = bytes.fromhex(key)
        if self._places.get(digest) is None or self._pen.batches != self._seen:
            self._refresh()
        place = self._places.get(digest)
        return None if place is None else self._reply(place)

    def put(self, key: str, reply: Reply) -> None:
        """Returns once the reply is on disk."""
        self.submit(key, reply).result()

    def submit(self, key: str, reply: Reply) -> Future[None]:
        """Done once the reply is on disk; those that wait together share one flush."""
        return self._pen.write(_line(key, reply))

    def usage(self) -> Usage:
        """Tokens of all replies on disk, each of those that were paid for twice included."""
        total = NOTHING
        self._refresh()
        for name in sorted(self._parts):
            for _, line in self._shelf.lines(name, 0):
                record = _record(line)
                # a record with the word of moderation repeats one that came before
                if record is not None and record["flagged"] is None:
                    total = total.plus(_reply(record).usage)
        return total

    def close(self) -> None:
        """Returns once all that was submitted is on disk; nothing can be put after it."""
        self._pen.close()

    def _reply(self, place: int) -> Reply | None:
        name, offset = self._parts[place >> _OFFSET_BITS], place & ((1 << _OFFSET_BITS) - 1)
        record = _record(self._shelf.line(name, offset))
        if record is None:
            raise DatasetError(f"{self._shelf}/{name} was changed: no record at byte {offset}")
        return _reply(record)

    def _refresh(self) -> None:
        """Reads whatever was appended to any part since the last time."""
        with self._reading:
            self._seen = self._pen.batches
            for name in self._shelf.grown(self._read_up_to):
                if name not in self._numbers:
                    self._numbers[name] = len(self._parts)
                    self._parts.append(name)
                self._read(name)

    def _read(self, name: str) -> None:
        number, corrupt = self._numbers[name], 0
        for offset, line in self._shelf.lines(name, self._read_up_to.get(name, 0)):
            self._read_up_to[name] = offset + len(line) + 1
            if _is_whole(line):
                digest = bytes.fromhex(line[_KEY].decode())
                place = number << _OFFSET_BITS | offset
                if self._is_later(place, self._places.get(digest)):
                    self._places.put(digest, place)
            else:
                corrupt += 1
        self._corrupt += corrupt
        if corrupt:
            _log.warning(
                "%s/%s: %d lines are no records and are left out", self._shelf, name, corrupt
            )

    def _is_later(self, place: int, known: int | None) -> bool:
        if known is None:
            return True
        new, old = place >> _OFFSET_BITS, known >> _OFFSET_BITS
        return place > known if new == old else self._parts[new] > self._parts[old]


class _Pen:
    """The part of this process, and the thread that appends to it."""

    def __init__(self, shelf: Shelf) -> None:
        self.batches = 0
        """That are on disk."""
        self._shelf = shelf
        self._lines: queue.SimpleQueue[tuple[bytes, Future[None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closed = False
        self._ending = threading.Event()

    def write(self, line: bytes) -> Future[None]:
        written: Future[None] = Future()
        written.set_running_or_notify_cancel()  # whoever waits may be cancelled, the line not
        with self._starting:
            if self._closed:
                raise ConfigError(f"the journal {self._shelf} is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
                self._thread.start()
            self._lines.put((line, written))
        return written

    def close(self) -> None:
        with self._starting:
            self._closed = True
            thread, self._thread = self._thread, None
            if thread is not None:
                self._lines.put(None)
                self._ending.set()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        failure: OSError | Ip2pError | None = None
        with contextlib.closing(self._shelf):
            for batch in self._batches():
                try:
                    if failure is None:
                        self._shelf.append(b"".join(line for line, _ in batch))
                        self.batches += 1
                except Exception as error:  # noqa: BLE001 - else its writers would wait for ever
                    # What stands there now is not known: nothing may follow it.
                    failure = _told(error)
                for _, written in batch:
                    if failure is None:
                        written.set_result(None)
                    else:
                        written.set_exception(failure)

    def _batches(self) -> Iterator[list[tuple[bytes, Future[None]]]]:
        """Whatever has come together meanwhile, until the end."""
        begun = -self._shelf.every_s
        while True:
            items = [self._lines.get()]
            self._ending.wait(begun + self._shelf.every_s - time.monotonic())
            begun = time.monotonic()
            with contextlib.suppress(queue.Empty):
                while items[-1] is not None:
                    items.append(self._lines.get_nowait())
            batch = [item for item in items if item is not None]
            if batch:
                yield batch
            if items[-1] is None:
                return


class Writer(Protocol):
    """A language model that can be asked for one reply at a time."""

    @property
    def model(self) -> str:
        """Its name."""
        ...

    @property
    def recipe(self) -> str:
        """Identifies how it is asked."""
        ...

    async def write(self, caption: str) -> Reply:
        """Its reply to a caption; this may cost money."""
        ...

    async def moderate(self, caption: str, reply: Reply) -> Reply:
        """The reply with `flagged` set, or the same reply if it needs no moderation."""
        ...


class JournalledWriter:
    """A writer whose every reply is on disk before it is used, and is asked for once.

    What was answered once, in this process or another, now or before a crash, is read; callers
    who ask for the same at the same time share one request. A caller that is cancelled leaves its
    request running: the reply is paid for, so it is kept. Belongs to one event loop.

    `turn` bounds the requests in flight. A reply that is on disk in a moment is waited for in its
    turn, so that no more of them can be lost at once; one that waits for a store's flush is not, or
    the turns would be spent on waiting.
    """

    def __init__(
        self,
        writer: Writer,
        journal: Journal,
        turn: AbstractAsyncContextManager[object] | None = None,
    ) -> None:
        self.asked = 0
        """Replies that were asked for."""
        self.found = 0
        """Replies that were on disk already."""
        self._writer = writer
        self._journal = journal
        self._turn = turn or contextlib.nullcontext()
        self._in_flight: dict[str, asyncio.Task[Reply]] = {}

    async def write(self, caption: str) -> Reply:
        """The reply to a caption; raises what the writer raises."""
        key = reply_key(caption, self._writer.model, self._writer.recipe)
        task = self._in_flight.get(key)
        if task is None:
            task = asyncio.create_task(self._answer(key, caption))
            self._in_flight[key] = task
            task.add_done_callback(lambda done: self._landed(key, done))
        return await asyncio.shield(task)

    async def finish(self) -> None:
        """Returns once no request is in flight."""
        await asyncio.gather(*self._in_flight.values(), return_exceptions=True)

    async def _answer(self, key: str, caption: str) -> Reply:
        unkept: list[Future[None]] = []
        async with self._turn:
            reply = await asyncio.to_thread(self._journal.get, key)
            if reply is None:
                self.asked += 1
                reply = await self._writer.write(caption)
                unkept += await self._keep(key, reply)
            else:
                self.found += 1
            moderated = await self._writer.moderate(caption, reply)
            if moderated != reply:
                unkept += await self._keep(key, moderated)
        for kept in unkept:
            await asyncio.wrap_future(kept)
        return moderated

    async def _keep(self, key: str, reply: Reply) -> list[Future[None]]:
        """What is left to be waited for."""
        kept = self._journal.submit(key, reply)
        if self._journal.flush_s:
            return [kept]
        await asyncio.wrap_future(kept)
        return []

    def _landed(self, key: str, task: asyncio.Task[Reply]) -> None:
        del self._in_flight[key]
        if not task.cancelled():
            task.exception()  # looked at, even if every caller was cancelled


def _told(error: Exception) -> OSError | Ip2pError:
    """What a store raised, as an error that a run can be stopped by."""
    if isinstance(error, OSError | Ip2pError):
        return error
    told = StageError(f"journal: {type(error).__name__}: {error}")
    told.__cause__ = error
    return told


def _line(key: str, reply: Reply) -> bytes:
    if not re.fullmatch("[0-9a-f]{32}", key):
        raise ConfigError(f"a key of a journal is 32 hex digits, got {key!r}")
    fields = {"key": key, **asdict(reply)}
    body = json.dumps(fields, separators=(",", ":")).encode()[:-1]
    return body + _CHECKSUM_START + _checksum(body) + b'"}\n'


def _record(line: bytes) -> dict[str, Any] | None:
    """The content of a line without its newline, or None if it is no record."""
    if not _is_whole(line):
        return None
    found: dict[str, Any] = json.loads(line)
    return found


def _is_whole(line: bytes) -> bool:
    body, tail = line[:-_TAIL], line[-_TAIL:]
    return body.startswith(_KEY_START) and tail == _CHECKSUM_START + _checksum(body) + b'"}'


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).hexdigest().encode()


def _reply(record: dict[str, Any]) -> Reply:
    return Reply(**{name: record[name] for name in Reply.__dataclass_fields__})
