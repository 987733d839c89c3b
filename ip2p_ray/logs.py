"""Log lines that say what they are of: text for people, or with IP2P_LOG=json an object a line.

    {"time": "2026-01-31T12:00:00.000+00:00", "level": "info", "message": "...",
     "job": "generate_pairs", "dataset": "candidates", "stage": "pairs", "part": "2 of 7"}

Those of an actor name it ("actor"), those of a file of a dataset that file ("shard").
No line holds a prompt, a picture or a key: that is for whoever writes it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO, TypeVar

JSON = "json"
"""Value of the environment variable IP2P_LOG that asks for objects."""

T = TypeVar("T")

_ABOUT: ContextVar[Mapping[str, str]] = ContextVar("about", default={})  # noqa: B039 - never changed
_OF_THE_PROCESS: dict[str, str] = {}
_OF_AN_ERROR = "_ip2p_about"

_printed = logging.getLogger("ip2p_ray.printed")


@contextmanager
def about(**names: str) -> Iterator[None]:
    """Lines that are logged in the block, and in what copies its context, are of these names."""
    before = _ABOUT.set({**_ABOUT.get(), **names})
    try:
        yield
    except Exception as error:
        vars(error).setdefault(_OF_AN_ERROR, _ABOUT.get())
        raise
    finally:
        _ABOUT.reset(before)


@contextmanager
def blamed(**names: str) -> Iterator[None]:
    """An error that leaves the block is of these names (`about_error`); lines in it are not."""
    try:
        yield
    except Exception as error:
        vars(error).setdefault(_OF_AN_ERROR, {**_ABOUT.get(), **names})
        raise


def about_error(error: Exception) -> dict[str, str]:
    """What the innermost block was of that the error left."""
    return {**vars(error).get(_OF_AN_ERROR, {})}


def follow(**names: str) -> None:
    """All lines of this process of Ray's are of these names, unless a block says otherwise.

    Where lines are objects they go to stderr, which Ray keeps in a file for each process, and
    nowhere else. Else they go where Ray sends those of the process, if anywhere.
    """
    _OF_THE_PROCESS.clear()
    _OF_THE_PROCESS.update(names)
    ours = logging.getLogger("ip2p_ray")
    if wants_json() and not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        ours.addHandler(handler)
        ours.setLevel(logging.DEBUG)
        ours.propagate = False  # Ray Train writes the lines of its workers a second time


def followed(about: Mapping[str, str], work: Callable[..., T], *arguments: Any) -> T:
    """What the function returns, in a task of Ray's whose lines are of these names."""
    follow(**about)
    return work(*arguments)


def names() -> dict[str, str]:
    """What a line that is logged here and now is of."""
    return {**_OF_THE_PROCESS, **_ABOUT.get()}


def wants_json() -> bool:
    """Whether the environment asks for objects."""
    return os.environ.get("IP2P_LOG", "") == JSON


def configure(stream: TextIO) -> None:
    """Sends this package's lines to the stream, and of other libraries only errors.

    Objects are for programs, which get the lines of every shard too. To be called once, in a
    process whose logging nobody has set up.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("ip2p_ray").setLevel(logging.DEBUG if wants_json() else logging.INFO)
    logging.captureWarnings(True)
    if wants_json():
        sys.excepthook = _log_uncaught


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    told = about_error(error) if isinstance(error, Exception) else {}
    with about(**told):
        logging.getLogger(__name__).critical("%s", kind.__name__, exc_info=(kind, error, trace))


def formatter(text: str, times: str | None = None) -> logging.Formatter:
    """For lines in the form `text` with `times`, or for objects where the environment asks so."""
    return JsonLines() if wants_json() else logging.Formatter(text, times)


@contextmanager
def printed_too() -> Iterator[None]:
    """What is printed in the block becomes lines of the log where these are objects."""
    if not wants_json():
        yield
        return
    printed = _Printed()
    with redirect_stdout(printed):
        try:
            yield
        finally:
            printed.end()


class _Printed(io.TextIOBase):
    def __init__(self) -> None:
        self._open = ""

    def write(self, text: str) -> int:
        *lines, self._open = (self._open + text).split("\n")
        for line in lines:
            _printed.info("%s", line)
        return len(text)

    def end(self) -> None:
        if self._open:
            self.write("\n")


class JsonLines(logging.Formatter):
    """A line for each record: time, level, message, and what it is of."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, in ASCII."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **names(),
        }
        if record.exc_info:
            fields["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(fields)
