"""What a job does before its libraries are loaded; nothing heavy is imported here."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ip2p_ray.errors import ConfigError


@contextmanager
def loading(name: str) -> Iterator[None]:
    """While the block runs, Ctrl-C ends the process with status 130 and one sentence.

    As an exception it could get lost in a callback of the import system, or show a traceback.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # whoever started this process wants it otherwise
        return

    def stop(*_: object) -> None:
        os.write(2, f"{name}: stopped before it began\n".encode())
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_web_address(text: str) -> bool:
    """Whether it is the address of a server, as https://host/v1, with a port that there can be."""
    try:
        url = urlsplit(text)
        _ = url.port
    except ValueError:
        return False
    return url.scheme in ("http", "https") and bool(url.hostname) and not set(text) & set(" \t\n")


CustomResources = tuple[tuple[str, float], ...]
"""Name and amount of each."""

_RESERVED = ("CPU", "GPU", "memory", "object_store_memory")


def custom_resources(flag: str, texts: Sequence[str]) -> CustomResources:
    """Custom resources of a Ray cluster, of texts like generator=1, in the order of their names.

    Raises:
        ConfigError: one is not like that; the flag and what was given are named.
    """
    found = []
    for text in texts:
        name, _, amount = text.partition("=")
        try:
            found.append((name, float(amount)))
        except ValueError as error:
            raise ConfigError(f"{flag} {text}: give NAME=AMOUNT, such as generator=1") from error
    require_resources(flag, found)
    return tuple(sorted(found))


def require_resources(flag: str, given: Sequence[tuple[str, float]]) -> None:
    """Checks that they can be custom resources of an actor: each once, of no name of Ray's own.

    Raises:
        ConfigError: they cannot; the flag and what is wrong are named.
    """
    names = [name for name, _ in given]
    for name, amount in given:
        if not name or name != name.strip():
            raise ConfigError(f"{flag} {name}={amount:g}: a resource has a name without blanks")
        if name in _RESERVED:
            raise ConfigError(f"{flag} {name}={amount:g}: {name} is Ray's own; it has flags")
        if not (math.isfinite(amount) and amount >= 1e-4):  # Ray counts in ten thousandths
            raise ConfigError(f"{flag} {name}={amount:g}: an amount is at least 0.0001")
        if names.count(name) > 1:
            raise ConfigError(f"{flag} names {name} more than once")


def require_uri(flag: str, uri: str | Path, *, written: bool = False) -> None:
    """Checks that it is a local path or file:///..., or s3://bucket/folder.

    A local folder that is to be `written` is checked as `require_place` does.

    Raises:
        ConfigError: it is not; the flag and what was given are named.
    """
    text = str(uri)
    if "://" in text and not text.startswith(("file://", "s3://")):
        raise ConfigError(f"{flag} {text}: give a folder here or s3://bucket/folder")
    if text.startswith("s3://"):
        bucket = text.removeprefix("s3://").partition("/")[0]
        if not bucket:
            raise ConfigError(f"{flag} {text} names no bucket: give s3://bucket/folder")
    elif written:
        require_place(flag, Path(text.removeprefix("file://")), folder=True)


def in_rays_copy() -> bool:
    """Whether this runs in the folder into which Ray has unpacked a job's working directory."""
    return any(part.startswith("_ray_pkg_") for part in Path.cwd().parts)


def require_place(flag: str, path: Path, *, folder: bool) -> None:
    """Checks that a file, or a folder, can be written at `path`, as far as that can be seen now.

    In a submitted job the path is absolute, or what is written there would go with the job.

    Raises:
        ConfigError: it cannot; the flag, the path and the reason are named.
    """
    if not path.is_absolute() and in_rays_copy():
        raise ConfigError(
            f"{flag} {path} would lie in Ray's copy of the working directory, which goes with the "
            "job: give the absolute path of a folder that all nodes share, or s3://bucket/folder"
        )
    if folder and os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where it may not look
        raise ConfigError(f"{flag} {path} is a file; give a folder")
    if not folder and os.path.isdir(path):  # noqa: PTH112
        raise ConfigError(f"{flag} {path} is a folder; give a file")
    above = path.absolute() if folder else path.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    if not os.path.isdir(above):  # noqa: PTH112
        raise ConfigError(f"{flag} {path} cannot be made: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path} cannot be made: {above} is not writable")
