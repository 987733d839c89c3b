"""The attempt at a dataset that runs now: it notes in storage how far it is and how it ended."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, replace
from typing import Any, Protocol

from ip2p_ray import storage
from ip2p_ray.errors import StorageError
from ip2p_ray.notes import MOST_FAILURES, ORIGIN, Ended, Note, noted_in, read_origin

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray where a submitted job runs


class Counting(Protocol):
    """What `progress.Progress` tells of itself."""

    done: int
    total: int
    unit: str
    verdicts: Counter[str | None]
    busy: Mapping[str, float]

    def rate(self) -> float | None:
        """Units a second of late."""


class Attempt:
    """One attempt, which is as far as `counts` and the last that is followed tell together.

    An attempt may be made within another, as at a part of a dataset; what it follows, the other
    does too.
    """

    def __init__(self, uri: str, origin: Mapping[str, Any], above: Attempt | None) -> None:
        found = read_origin(uri)
        noted = noted_in(found)
        self.uri, self.above = uri, above
        self.counts: Note | None = None
        self._followed: list[Counting] = []
        self._adds = False
        self._rate = noted.note.rate if noted.note else None
        self._origin = origin
        self._earlier = noted.attempts
        self._began, self._clock = time.time(), time.monotonic()
        self._failures = list(noted.note.failures) if noted.note else []
        self._busy = noted.note.busy if noted.note else {}
        self._ended: Ended = ""
        self._writing = threading.Lock()

    def seconds(self) -> float:
        """Of this attempt and of all before it."""
        return round(sum(self._earlier) + self._lasted(), 3)

    def follow(self, progress: Counting) -> None:
        """See `follow`."""
        self._followed.append(progress)
        self._adds = True

    def count(self, counts: Note) -> None:
        """See `count`."""
        self.counts, self._adds = counts, False

    def end(self, ended: Ended, sentence: str = "") -> None:
        """How it ended; of a failure in one sentence."""
        self._ended = ended
        if sentence:
            failure = {"at": round(time.time(), 3), "sentence": sentence}
            self._failures = [*self._failures, failure][-MOST_FAILURES:]

    def note(self) -> None:
        """Writes all of it to ORIGIN."""
        with self._writing:
            content = {
                **self._origin,
                "attempts": [*self._earlier, round(self._lasted(), 3)],
                "now": asdict(self._note()),
            }
            place = storage.join(self.uri, ORIGIN)
            storage.write_bytes(place, json.dumps(content, indent=2).encode())

    def _lasted(self) -> float:
        return time.monotonic() - self._clock

    def _note(self) -> Note:
        busy = defaultdict[str, float](float, self._busy)
        for each in self._followed:
            for name, seconds in each.busy.items():
                busy[name] += seconds
        return replace(
            self.counted(),
            began=round(self._began, 3),
            updated=round(time.time(), 3),
            ended=self._ended,
            busy={name: round(seconds, 3) for name, seconds in busy.items()},
            failures=self._failures,
            host=socket.gethostname(),
            job=_submission(),
        )

    def counted(self) -> Note:
        """`counts`, and what the last that was followed since has beyond them."""
        if not self._adds:
            return replace(self.counts or Note(), rate=self._rate)
        now, base = self._followed[-1], self.counts
        self._rate = now.rate() or self._rate
        verdicts = Counter(now.verdicts)
        if base is not None:
            verdicts[None] += base.kept or 0
            verdicts.update(Counter[str | None](base.rejected))
        return Note(
            done=now.done + (base.done or 0 if base else 0),
            total=base.total if base else now.total,
            unit=base.unit if base else now.unit,
            rate=self._rate,
            **judged(verdicts),
        )


def _submission() -> str:
    """With what `ray job logs` finds this job; "" where nobody submitted it."""
    told = json.loads(os.environ.get(_JOB_CONFIG, "{}"))
    return str((told.get("metadata") or {}).get("job_submission_id", ""))


def judged(verdicts: Counter[str | None]) -> dict[str, Any]:
    """The fields `kept` and `rejected` of a Note."""
    rejected = {reason: n for reason, n in verdicts.most_common() if reason is not None and n}
    return {"kept": verdicts[None] if verdicts.total() else None, "rejected": rejected}


_CURRENT: ContextVar[Attempt | None] = ContextVar("attempt", default=None)


@contextmanager
def attempt(
    uri: str,
    origin: Mapping[str, Any],
    every_s: float,
    told: Callable[[Exception], str],
) -> Iterator[Callable[[], float]]:
    """Writes ORIGIN and keeps it up to date; yields what tells the seconds of all attempts.

    `told` makes a sentence of the exception that ends it.
    """
    this = Attempt(uri, origin, _CURRENT.get())
    stop = threading.Event()

    def note_now_and_then() -> None:
        while not stop.wait(every_s):
            with suppress(
                OSError, StorageError
            ):  # it is only a note; what matters fails where it is written
                this.note()

    this.note()
    thread = threading.Thread(target=note_now_and_then, daemon=True)
    thread.start()
    before = _CURRENT.set(this)
    try:
        yield this.seconds
        this.end("made")
    except Exception as error:
        this.end("failed", told(error))
        raise
    except BaseException:
        this.end("stopped")
        raise
    finally:
        _CURRENT.reset(before)
        stop.set()
        thread.join()
        with suppress(OSError, StorageError):
            this.note()


def follow(progress: Counting) -> None:
    """From now on the attempt that runs, if any does, is as far as the progress says."""
    this = _CURRENT.get()
    while this is not None:
        this.follow(progress)
        this = this.above


def reached() -> Note | None:
    """How far the outermost attempt is that runs; None where none does."""
    this = _CURRENT.get()
    while this is not None and this.above is not None:
        this = this.above
    return this.counted() if this is not None else None


def count(done: int, total: int, unit: str, verdicts: Counter[str | None]) -> None:
    """The attempt that runs is so far; what is followed from now on comes on top of it."""
    this = _CURRENT.get()
    if this is not None:
        this.count(Note(done=done, total=total, unit=unit, **judged(verdicts)))
