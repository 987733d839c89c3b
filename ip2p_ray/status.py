"""How far datasets are, from what lies in storage alone: while they are made, and after a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any, Literal

from ip2p_ray import storage
from ip2p_ray.errors import DatasetError
from ip2p_ray.notes import NOTE_EVERY_S, Note, noted_in, read_origin
from ip2p_ray.report import duration, size

SILENT_S = 6 * NOTE_EVERY_S
"""Without a note for so long, whoever made a dataset is gone, or cannot reach the storage; clocks
may differ by most of it."""

CHECKPOINTS = "checkpoints"
_METRICS, _STEP = "metrics.jsonl", "step-"
_DEPTH = 2  # a run's folder has datasets, and rejects/ has some more

State = Literal["whole", "working", "silent", "failed", "stopped", "begun", "unreadable"]
"""`silent` gave no sign of life for SILENT_S, `stopped` was told to; of `begun` no more is
known; of `unreadable` a file is damaged, as `problem` says."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What training measured last."""

    step: int | None
    """Of the newest line of metrics."""
    checkpoint: int | None
    """Step of the newest checkpoint, at which a run goes on."""
    figures: Mapping[str, float]
    """loss, validation_loss, images_per_s, workers, as far as they are measured."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Of one dataset; what is not known is None."""

    uri: str
    dataset: str
    """Its name in the flow."""
    state: State
    done: int | None = None
    total: int | None = None
    unit: str = "rows"
    kept: int | None = None
    """Of those that were judged so far."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """The others by reason, most frequent first."""
    seconds: float = 0.0
    """Of all attempts."""
    attempts: int = 0
    left_s: float | None = None
    """By the rate of late: to go, or, of what stands still, once it goes on."""
    device_seconds: float | None = None
    """As the manifest says."""
    busy: Mapping[str, float] = field(default_factory=dict)
    """Seconds that actors worked, by their class."""
    bytes: int | None = None
    """Of the shards of a whole dataset."""
    failures: Sequence[Mapping[str, Any]] = ()
    """`at`, in seconds since 1970, and `sentence` of attempts that failed, the newest last."""
    updated: float | None = None
    """When it was noted last, in seconds since 1970."""
    host: str = ""
    job: str = ""
    training: Training | None = None
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The fields, as JSON can express them."""
        return asdict(self)


def statuses(uri: str, now: float | None = None) -> list[Status]:
    """Of the dataset at the URI, or of all in a run's folder.

    Those that are whole come first, in the order in which they became so.

    Raises:
        DatasetError: there is none, or what is noted of the one dataset cannot be read.
        StorageError: object storage refuses.
    """
    now = time.time() if now is None else now
    found = status_of(uri, now)
    if found is not None:
        return [found]
    below = _below(uri, now)
    if not below:
        what = "there is no dataset in" if storage.any_there(uri) else "there is no"
        raise DatasetError(f"{what} {uri}; give the folder of a dataset, or that of a run")
    return sorted(below, key=lambda each: (each.state != "whole", each.updated or 0.0, each.uri))


def status_of(uri: str, now: float) -> Status | None:
    """Of the dataset at the URI; None where there is none.

    Raises:
        DatasetError: one of its files cannot be read.
        StorageError: object storage refuses.
    """
    origin = read_origin(uri)
    whole = storage.exists(storage.join(uri, storage.MANIFEST))
    if not origin and not whole:
        return None
    noted = noted_in(origin)
    known: dict[str, Any] = {"uri": str(uri), "dataset": noted.dataset}
    known |= {"seconds": sum(noted.attempts), "attempts": len(noted.attempts)}
    known |= _of_note(noted.note)
    if whole:
        known |= _of_manifest(storage.read_manifest(uri))
    else:
        known["state"] = _state(noted.note, now)
    if noted.dataset == CHECKPOINTS:
        known |= _of_training(uri, origin)
    known["left_s"] = None if whole else _left(noted.note, known.get("done"), known.get("total"))
    return Status(**known)


def lines(found: Sequence[Status], now: float | None = None) -> list[str]:
    """The statuses for people, some lines for each dataset, which is named by its place."""
    now = time.time() if now is None else now
    return [
        line
        for status, name in zip(found, _names(found), strict=True)
        for line in [f"{name}: {_headline(status, now)}", *_details(status, now)]
    ]


def _names(found: Sequence[Status]) -> list[str]:
    """The ends of their URIs, from where these part."""
    places = [status.uri.rstrip("/").split("/") for status in found]
    folders = zip(*(place[:-1] for place in places), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, folders))
    return ["/".join(place[shared:]) for place in places]


def _details(status: Status, now: float) -> list[str]:
    told = []
    judged = (status.kept or 0) + sum(status.rejected.values())
    if status.kept is not None and judged:
        share = f" ({100 * status.kept / judged:.0f} %)"
        rejects = ", ".join(f"{reason} {count:,}" for reason, count in status.rejected.items())
        more = f"; rejected {rejects}" if rejects else ""
        told.append(f"  survival  kept {status.kept:,} of {judged:,}{share}{more}")
    if status.training is not None:
        told.append(f"  training  {_trained(status.training)}")
    if status.state not in ("whole", "unreadable"):
        told.append(f"  time      {_times(status)} so far")
    if status.busy and status.state != "whole":
        busy = ", ".join(f"{name} {duration(seconds)}" for name, seconds in status.busy.items())
        told.append(f"  busy      {busy}")
    if status.state not in ("whole", "failed") and status.updated is not None:
        job = f", job {status.job}" if status.job else ""
        heard = f"heard {duration(max(0.0, now - status.updated))} ago"
        if status.updated > now + 1.0:
            heard = f"whose clock is {duration(status.updated - now)} ahead of the one here"
        told.append(f"  by        {status.host}{job}, {heard}")
    for failure in status.failures[-1:]:
        before = len(status.failures) - 1
        more = f" (and {before} before)" if before else ""
        told.append(f"  failure   {_clock(failure['at'])}: {failure['sentence']}{more}")
    return told


def _below(uri: str, now: float, depth: int = 1) -> list[Status]:
    """Of the datasets in a folder and its folders; a dataset's own parts are passed over."""
    found = []
    for name in storage.folders(uri):
        place = storage.join(uri, name)
        try:
            status = status_of(place, now)
        except DatasetError as error:
            status = Status(uri=place, dataset=name, state="unreadable", problem=str(error))
        if status is not None:
            found.append(status)
        elif depth < _DEPTH:
            found += _below(place, now, depth + 1)
    return found


def _state(note: Note | None, now: float) -> State:
    if note is None or note.ended == "made":  # an earlier version said so before its manifest
        return "begun"
    if note.ended in ("failed", "stopped"):
        return "failed" if note.ended == "failed" else "stopped"
    return "silent" if now - note.updated > SILENT_S else "working"


def _of_note(note: Note | None) -> dict[str, Any]:
    if note is None:
        return {}
    return {
        **{name: getattr(note, name) for name in ("done", "total", "unit", "kept", "rejected")},
        **{name: getattr(note, name) for name in ("busy", "failures", "host", "job", "updated")},
    }


def _of_manifest(manifest: storage.Manifest) -> dict[str, Any]:
    try:
        known: dict[str, Any] = {
            "state": "whole",
            "dataset": manifest.dataset,
            "done": manifest.rows,
            "total": manifest.rows,
            "unit": "rows",
            "seconds": float(manifest.wall_seconds),
            "device_seconds": float(manifest.device_seconds),
            "bytes": sum(shard.bytes for shard in manifest.shards),
        }
        for report in manifest.reports[-1:]:
            rejected = sorted(report["rejected"].items(), key=lambda each: -each[1])
            known |= {"kept": report["rows_out"], "rejected": dict(rejected)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"the manifest of {manifest.dataset} cannot be read: {error}") from error
    return known


def _of_training(uri: str, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What checkpoints and their metrics say, which is more than a note does."""
    steps, measured = _steps(uri), _measured(uri)
    names = ("loss", "validation_loss", "images_per_s", "workers")
    figures = {
        name: value
        for line in measured
        for name, value in line.items()
        if name in names and isinstance(value, int | float)
    }
    figures = {name: figures[name] for name in names if name in figures}
    counted = [line["step"] for line in measured if isinstance(line.get("step"), int)]
    step = counted[-1] if counted else None
    checkpoint = max(steps) if steps else None
    known: dict[str, Any] = {
        "unit": "steps",
        "training": Training(step=step, checkpoint=checkpoint, figures=figures),
    }
    config = origin.get("config")
    total = config.get("steps") if isinstance(config, Mapping) else None
    if isinstance(total, int):
        known |= {"done": max(step or 0, checkpoint or 0), "total": total}
    return known


def _steps(uri: str) -> list[int]:
    steps = (name.removeprefix(_STEP) for name in storage.folders(uri) if name.startswith(_STEP))
    return [int(step) for step in steps if step.isdecimal()]


def _measured(uri: str) -> list[dict[str, Any]]:
    """Lines of metrics; one whose end a kill cut off, or that is no object, is passed over."""
    place = storage.join(uri, _METRICS)
    if not storage.exists(place):
        return []
    found = []
    for line in storage.read_bytes(place).decode(errors="replace").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def _left(note: Note | None, done: int | None, total: int | None) -> float | None:
    if note is None or not note.rate or done is None or total is None:
        return None
    return max(0, total - done) / note.rate


def _headline(status: Status, now: float) -> str:
    if status.state == "whole":
        rows = f", {status.done:,} {status.unit}" if status.bytes or status.training else ""
        weight = f", {size(status.bytes)}" if status.bytes else ""
        return f"whole{rows}{weight}, made in {_times(status)}"
    if status.state == "unreadable":
        return status.problem
    ago = "" if status.updated is None else duration(max(0.0, now - status.updated))
    since = "" if status.updated is None else _clock(status.updated)
    told = {
        "working": "being made",
        "silent": f"no sign of life since {since} ({ago}): killed, or cut off from the storage",
        "failed": f"failed {ago} ago",
        "stopped": f"stopped {ago} ago",
        "begun": "begun, not whole; no more is noted",
    }[status.state]
    if status.done is not None and status.total is not None:
        share = 100 * status.done / status.total if status.total else 100.0
        told += f"; {status.done:,} of {status.total:,} {status.unit} ({share:.0f} %)"
    if status.left_s is not None:
        left = f"about {duration(status.left_s)}"
        told += f", {left} left" if status.state == "working" else f", {left} more once it goes on"
    return told


def _times(status: Status) -> str:
    told = duration(status.seconds)
    if status.attempts > 1:
        told += f" in {status.attempts} attempts"
    if status.device_seconds:
        told += f", {duration(status.device_seconds)} of devices"
    return told


def _trained(training: Training) -> str:
    told = [f"step {training.step:,}"] if training.step is not None else []
    told += [f"{name} {value:.4g}" for name, value in training.figures.items()]
    if training.checkpoint is not None:
        told.append(f"newest checkpoint {training.checkpoint:,}")
    return ", ".join(told) or "nothing measured yet"


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
