"""Where the lines of a journal lie: in files of a folder, or in objects of a store.

A shelf has parts, by name, each of which only ever grows. One process writes a part, and all read
all of them. On disk a line counts from the moment its file is synced. An object cannot be appended
to, so it is put again with what has come since, whole each time, until it is large enough and
another is begun: whenever a process is killed, what was put before is there.
"""

from __future__ import annotations

import bisect
import os
import re
import secrets
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

SUFFIX = ".jsonl"
"""Of the names of parts."""

OBJECT_BYTES = 1 << 18
"""An object that has so many is not put again."""

FLUSH_S = 1.0
"""Objects are put, and looked for, at most so often."""

_CHUNK = 1 << 16
_AT_ONCE = 16


class Line(NamedTuple):
    """A whole line without its newline, and the byte of its part at which it starts."""

    offset: int
    line: bytes


class Store(Protocol):
    """Objects by name, each of which is there whole or not at all."""

    def list(self) -> Iterable[tuple[str, int]]:
        """Name and bytes of each."""
        ...

    def read(self, name: str, start: int) -> bytes:
        """An object from byte `start` on."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Returns once the object is there, in place of what was."""
        ...


class Shelf(Protocol):
    """What a journal needs of the place of its lines."""

    every_s: float
    """Seconds between two appends that pay."""

    def grown(self, read_up_to: Mapping[str, int]) -> Iterator[str]:
        """The parts that have more bytes than were read, 0 of one that is not named."""
        ...

    def lines(self, name: str, start: int) -> Iterator[Line]:
        """The whole lines of a part from byte `start` on."""
        ...

    def line(self, name: str, offset: int) -> bytes:
        """The line of a part that starts at a byte."""
        ...

    def append(self, data: bytes) -> None:
        """Returns once the lines are kept, in this process's own part."""
        ...

    def close(self) -> None:
        """Nothing is appended any more."""
        ...


class FolderShelf:
    """Files of a folder, on disk when `append` returns."""

    every_s = 0.0

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = -1

    def __str__(self) -> str:
        return str(self._folder)

    def grown(self, read_up_to: Mapping[str, int]) -> Iterator[str]:
        """See `Shelf`."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not entry.name.endswith(SUFFIX):
                    continue
                if entry.stat().st_size > read_up_to.get(entry.name, 0):
                    yield entry.name

    def lines(self, name: str, start: int) -> Iterator[Line]:
        """See `Shelf`."""
        with (self._folder / name).open("rb") as stream:
            stream.seek(start)
            offset = start
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                yield Line(offset, line[:-1])
                offset += len(line)

    def line(self, name: str, offset: int) -> bytes:
        """See `Shelf`."""
        with (self._folder / name).open("rb") as stream:
            stream.seek(offset)
            return stream.readline().rstrip(b"\n")

    def append(self, data: bytes) -> None:
        """See `Shelf`."""
        if self._file < 0:
            self._file = _new_file(self._folder)
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def close(self) -> None:
        """See `Shelf`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class StoreShelf:
    """Objects of a store, of which this process keeps a copy in a nameless file of its own."""

    def __init__(self, store: Store, every_s: float = FLUSH_S) -> None:
        self.every_s = every_s
        self._store = store
        self._name = _new_name()
        self._objects = 0
        self._content = b""
        self._listed = -every_s
        self._copies: dict[str, _Copy] = {}
        self._lock = threading.Lock()  # of the copies; the file is only ever appended to
        with tempfile.TemporaryFile() as file:
            self._file = os.dup(file.fileno())
        self._end = 0
        weakref.finalize(self, os.close, self._file)

    def __str__(self) -> str:
        return str(self._store)

    def grown(self, read_up_to: Mapping[str, int]) -> Iterator[str]:
        """See `Shelf`; what others have put is seen after `every_s` at the latest."""
        if time.monotonic() - self._listed >= self.every_s:
            self._listed = time.monotonic()
            self._fetch()
        with self._lock:
            names = [
                name for name, copy in self._copies.items() if copy.bytes > read_up_to.get(name, 0)
            ]
        yield from names

    def lines(self, name: str, start: int) -> Iterator[Line]:
        """See `Shelf`."""
        with self._lock:
            copy = self._copies[name]
            pieces = list(copy.pieces())
        offset, rest = start, b""
        for first, place, size in pieces:
            skip = max(0, start - first)
            if skip >= size:
                continue
            *lines, rest = (rest + os.pread(self._file, size - skip, place + skip)).split(b"\n")
            for line in lines:
                yield Line(offset, line)
                offset += len(line) + 1

    def line(self, name: str, offset: int) -> bytes:
        """See `Shelf`."""
        with self._lock:
            place = self._copies[name].place(offset)
        found = b""
        while b"\n" not in found:
            more = os.pread(self._file, _CHUNK, place + len(found))
            if not more:
                break
            found += more
        return found.partition(b"\n")[0]

    def append(self, data: bytes) -> None:
        """See `Shelf`."""
        if self._content and len(self._content) + len(data) > OBJECT_BYTES:
            self._objects += 1
            self._content = b""
        name = f"{self._name}-{self._objects:06d}{SUFFIX}"
        self._store.put(name, self._content + data)
        self._keep(name, len(self._content), data)
        self._content += data

    def close(self) -> None:
        """See `Shelf`."""

    def _fetch(self) -> None:
        """Copies what others have put since the last time."""
        with self._lock:
            known = {name: copy.bytes for name, copy in self._copies.items()}
        fresh = [
            (name, known.get(name, 0))
            for name, size in self._store.list()
            if name.endswith(SUFFIX)
            and size > known.get(name, 0)
            and not name.startswith(self._name)
        ]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for first in range(0, len(fresh), _AT_ONCE):
                some = fresh[first : first + _AT_ONCE]
                for (name, start), data in zip(
                    some, pool.map(lambda told: self._store.read(*told), some), strict=True
                ):
                    self._keep(name, start, data)

    def _keep(self, name: str, start: int, data: bytes) -> None:
        """Copies what an object has from a byte on."""
        with self._lock:
            place, self._end = self._end, self._end + len(data)
            copied = memoryview(data)
            while copied:
                copied = copied[os.pwrite(self._file, copied, self._end - len(copied)) :]
            self._copies.setdefault(name, _Copy()).add(start, place, len(data))


class _Copy:
    """Which bytes of the nameless file are those of an object."""

    def __init__(self) -> None:
        self.bytes = 0
        self._starts: list[int] = []
        self._places: list[int] = []

    def add(self, start: int, place: int, size: int) -> None:
        self._starts.append(start)
        self._places.append(place)
        self.bytes = start + size

    def place(self, offset: int) -> int:
        piece = bisect.bisect_right(self._starts, offset) - 1
        return self._places[piece] + offset - self._starts[piece]

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """First byte of the object, its place in the file, and how many there are."""
        ends = [*self._starts[1:], self.bytes]
        for start, place, end in zip(self._starts, self._places, ends, strict=True):
            yield start, place, end - start


def _new_name() -> str:
    """Such that a later process's sorts later."""
    host = re.sub(r"\W", "-", socket.gethostname())[:40]
    return f"{time.time_ns():020d}-{host}-{os.getpid()}-{secrets.token_hex(4)}"


def _new_file(folder: Path) -> int:
    """A new file of the folder, and the folder on disk."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    file = os.open(folder / f"{_new_name()}{SUFFIX}", flags, 0o644)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return file
