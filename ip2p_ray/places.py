"""Where each of very many keys is, in little memory.

A dictionary of bytes and integers takes about 140 bytes a key, this between 36 and 72. Each actor
of a run of a million captions has such a table.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

_EMPTY = -1


class _Table(NamedTuple):
    """An open-addressed hash table; the first part of a digest is its hash."""

    first: array[int]
    second: array[int]
    places: array[int]
    """_EMPTY where there is no key."""

    def slot(self, first: int, second: int) -> int:
        """Where the key is, or would be."""
        mask = len(self.places) - 1
        slot = first & mask
        while self.places[slot] != _EMPTY and (
            self.first[slot] != first or self.second[slot] != second
        ):
            slot = slot + 1 & mask
        return slot


def _table(size: int) -> _Table:
    nothing = bytes(8 * size)
    return _Table(array("Q", nothing), array("Q", nothing), array("q", b"\xff" * (8 * size)))


class Places:
    """Places, at least 0 and below 2**63, by digests of 16 bytes that are evenly distributed.

    One thread at a time may write; any others may read meanwhile, and find whatever was written
    before they began.
    """

    def __init__(self) -> None:
        self._table = _table(1 << 10)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, digest: bytes) -> int | None:
        """The place of a key; None if there is none."""
        table = self._table
        place = table.places[table.slot(*_halves(digest))]
        return None if place == _EMPTY else place

    def put(self, digest: bytes, place: int) -> None:
        """The place of the key from now on."""
        first, second = _halves(digest)
        slot = self._table.slot(first, second)
        if self._table.places[slot] == _EMPTY:
            if 3 * self._count >= 2 * len(self._table.places):
                self._grow()
                slot = self._table.slot(first, second)
            self._table.first[slot], self._table.second[slot] = first, second
            self._count += 1
        self._table.places[slot] = place  # last: who reads meanwhile sees all of it or nothing

    def _grow(self) -> None:
        old, new = self._table, _table(2 * len(self._table.places))
        for first, second, place in zip(*old, strict=True):
            if place != _EMPTY:
                slot = new.slot(first, second)
                new.first[slot], new.second[slot], new.places[slot] = first, second, place
        self._table = new


def _halves(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
