"""The journal of replies as the processes of a cluster share it."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from ip2p_ray import lease, storage
from ip2p_ray.errors import StageError
from ip2p_ray.object_files import ObjectFolder
from ip2p_ray.triplets.journal import Journal


def opened(journal: str) -> Journal:
    """The journal in a folder that all nodes share, or in a bucket."""
    if storage.is_local(journal):
        return Journal(storage.local_path(journal))
    return Journal(ObjectFolder(journal))


@contextmanager
def held(journal: str, folder: str) -> Iterator[None]:
    """A journal in a bucket for this process alone while the block runs, and surely writable.

    Nothing is done where the folder has all replies. A journal on disk is for those alone who
    lock it (`sign`).

    Raises:
        StageError: another run is asking for it.
        StorageError: it cannot be written to.
    """
    whole = storage.exists(storage.join(folder, "replies", storage.MANIFEST))
    if whole or storage.is_local(journal):
        yield
        return
    storage.check(journal)
    with lease.held(storage.join(journal, ".lock")):
        yield


def sign(folder: str) -> TextIO | None:
    """A file, to be locked as long as somebody asks for a journal; None in a bucket."""
    if not storage.is_local(folder):
        return None
    place = storage.local_path(folder)
    place.mkdir(parents=True, exist_ok=True)
    return (place / ".asking").open("a")


def wait_for_others(journal: str, signs: str | None, wait_s: float) -> None:
    """Returns when no actor asks for this journal: after a kill some live on for a moment.

    Raises:
        StageError: some do after so many seconds.
    """
    until = time.monotonic() + wait_s
    file = sign(signs or journal)
    if file is None:
        return
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise StageError(
                        f"another run is asking for the journal {journal}; wait for it, or "
                        "give another journal"
                    ) from error
                time.sleep(0.2)
            else:
                return
