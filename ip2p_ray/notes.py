"""What an attempt at a dataset notes beside it, so that storage alone says how far it is.

<uri>/_origin.json     what it is made from, the seconds of each attempt, and under `now` a Note
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ip2p_ray import storage
from ip2p_ray.errors import DatasetError

ORIGIN = "_origin.json"

NOTE_EVERY_S = 10.0
"""How often an attempt notes itself; kill -9 loses at most so much of it."""

MOST_FAILURES = 5

Ended = Literal["", "made", "failed", "stopped"]
"""How an attempt ended; "" while it works, and for ever after kill -9."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """The newest attempt at a dataset, as it said last; times are seconds since 1970."""

    began: float = 0.0
    updated: float = 0.0
    """When it was noted last."""
    ended: Ended = ""
    done: int | None = None
    """Of `total`, those of earlier attempts included; None where nothing is counted."""
    total: int | None = None
    unit: str = "rows"
    rate: float | None = None
    """Units a second of late."""
    kept: int | None = None
    """Of the rows, or candidates, that were judged so far; None where nothing is judged on the
    way."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """The others by reason."""
    busy: Mapping[str, float] = field(default_factory=dict)
    """Seconds, of all attempts, that actors worked, by their class."""
    failures: Sequence[Mapping[str, Any]] = ()
    """`at` and `sentence` of attempts that failed, the newest last; at most MOST_FAILURES."""
    host: str = ""
    job: str = ""
    """Id with which it was submitted to Ray; "" where it was not."""


@dataclass(frozen=True, kw_only=True)
class Noted:
    """ORIGIN, as far as it tells of attempts."""

    dataset: str
    attempts: Sequence[float]
    """Seconds of each, the newest last."""
    note: Note | None
    """None in what was written before there were notes."""


def read_origin(uri: str) -> dict[str, Any]:
    """ORIGIN as it was written, empty where there is none.

    Raises:
        DatasetError: it cannot be read.
    """
    place = storage.join(uri, ORIGIN)
    if not storage.exists(place):
        return {}
    try:
        found = json.loads(storage.read_bytes(place))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{place} cannot be read: {error}") from error
    if not isinstance(found, dict) or not found:
        raise DatasetError(f"{place} cannot be read: it holds no object with fields")
    return found


def read_noted(uri: str) -> Noted | None:
    """What attempts at the dataset noted; None where nobody has begun to make it.

    Raises:
        DatasetError: it cannot be read.
    """
    found = read_origin(uri)
    return noted_in(found) if found else None


def noted_in(origin: Mapping[str, Any]) -> Noted:
    """What ORIGIN says; fields that other versions of this package added are passed over.

    Raises:
        DatasetError: a field holds what it cannot hold.
    """
    known = {each.name for each in fields(Note)}
    now = origin.get("now")
    note = None
    if isinstance(now, Mapping):
        note = Note(**{name: value for name, value in now.items() if name in known})
    dataset, attempts = str(origin.get("dataset", "")), origin.get("attempts", [])
    if not _are_numbers(attempts) or (note is not None and not _is_sound(note)):
        raise DatasetError(f"{ORIGIN} of {dataset} cannot be read: its notes have other types")
    return Noted(dataset=dataset, attempts=[float(seconds) for seconds in attempts], note=note)


def _is_sound(note: Note) -> bool:
    """Whether the fields have their types, which JSON does not promise."""
    maybe = (note.done, note.total, note.rate, note.kept)
    return (
        _are_numbers([note.began, note.updated, *(each for each in maybe if each is not None)])
        and all(isinstance(each, str) for each in (note.ended, note.unit, note.host, note.job))
        and all(
            isinstance(table, Mapping) and _are_numbers([*table.values()])
            for table in (note.rejected, note.busy)
        )
        and isinstance(note.failures, list | tuple)
        and all(
            isinstance(each, Mapping)
            and _are_numbers([each.get("at")])
            and isinstance(each.get("sentence"), str)
            for each in note.failures
        )
    )


def _are_numbers(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(each, int | float) for each in found)
