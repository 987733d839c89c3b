"""Files and folders that appear whole or not at all, and no leftovers of killed processes.

    .editor.partial/    the place where `editor` is written; locked while somebody does
        .lock
        new             takes the name `editor` by a rename when it is whole
        new.1A8AbC0b    of boto3, while it downloads `new`
        old             what had that name, for the moment between two renames

kill -9 leaves such a place behind, its lock free. It is settled when `editor` is written again and
by `remove_leftovers`: where the kill fell between the two renames the new folder gets its name,
else what was there before is there still; the rest is removed. So nothing that was whole is lost.

File systems without flock (local ones and NFS have it) do the same for one process at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

SUFFIX = ".partial"
LOCK, NEW, OLD = ".lock", "new", "old"


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; what is there takes the place of `path` when the block succeeds.

    Until then, and when the block fails or writes nothing, whatever was at `path` stays as it was.
    The bytes are on the disk before the name changes. A second writer of `path` waits.
    """
    target = Path(path)
    with _place(target) as place:
        new = place / NEW
        yield new
        if new.exists():
            sync(new)
            new.replace(target)
            sync(target.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """As `atomic_file`, but an empty folder to fill; a folder that was there is replaced whole."""
    target = Path(path)
    with _place(target) as place:
        new = place / NEW
        new.mkdir()
        yield new
        for written in (*new.rglob("*"), new):
            sync(written)
        if target.exists():
            target.rename(place / OLD)
        new.rename(target)
        sync(target.parent)


@contextmanager
def one_at_a_time(lock: str | Path) -> Iterator[None]:
    """The block, for one process after the other; the file `lock` is made, and stays."""
    Path(lock).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _acquire(handle, wait=True)
        yield
    finally:
        os.close(handle)


def remove_folder(path: str | Path) -> None:
    """Takes the folder out of sight by one rename, then deletes it: nobody sees a half of it."""
    target = Path(path)
    with _place(target) as place:
        target.rename(place / OLD)


def set_aside(folder: str | Path) -> Path:
    """The folder under its new name, broken-..., in the place of one that is there."""
    target = Path(folder).with_name(f"broken-{Path(folder).name}")
    if target.exists():
        remove_folder(target)
    Path(folder).rename(target)
    sync(target.parent)
    return target


def remove_leftovers(folder: str | Path) -> None:
    """Settles what killed processes were writing in the folder and below; the living go on."""
    for above, folders, _ in os.walk(folder):
        for name in [name for name in folders if name.startswith(".") and name.endswith(SUFFIX)]:
            place = Path(above) / name
            if not _is_ours(place):
                continue
            folders.remove(name)
            lock = _enter(place, wait=False)
            if lock is not None:
                logger.info("%s: left behind by a stopped process, cleared away", place)
                _leave(place, lock)


def _is_ours(place: Path) -> bool:
    """Whether the folder holds only what this module puts there: others use the suffix too."""
    try:
        names = {path.name for path in place.iterdir()}
    except FileNotFoundError:  # its writer has just finished
        return False
    ours = all(name in (LOCK, NEW, OLD) or name.startswith(f"{NEW}.") for name in names)
    return ours and not place.is_symlink()


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _place(target: Path) -> Iterator[Path]:
    """The empty place beside the target, for this block alone; it is gone afterwards."""
    place = target.with_name(f".{target.name}{SUFFIX}")
    lock = _enter(place)
    assert lock is not None
    try:
        _settle(place)
        yield place
    finally:
        _leave(place, lock)


def _enter(place: Path, *, wait: bool = True) -> int | None:
    """The held lock of the place, which is made if need be; None if another has it."""
    while True:
        try:
            place.mkdir(parents=True, exist_ok=True)
            lock = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileExistsError, FileNotFoundError):
            if _is_no_folder(place):
                raise
            continue  # whoever was here before has just removed the place
        free = _acquire(lock, wait=wait)
        if free and _is_in(lock, place):
            return lock
        os.close(lock)
        if not free:
            return None


def _is_no_folder(place: Path) -> bool:
    """Whether something else is there; one look, for places come and go."""
    try:
        return not stat.S_ISDIR(place.stat().st_mode)
    except FileNotFoundError:
        return False


def _acquire(lock: int, *, wait: bool) -> bool:
    """Whether it is held now; False where another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.debug("no locks on this file system: %s", error)
    return True


def _is_in(lock: int, place: Path) -> bool:
    """Whether it is still the place's lock: while it was waited for, the place may have gone."""
    try:
        return os.path.samestat(os.fstat(lock), (place / LOCK).stat())
    except FileNotFoundError:
        return False


def _settle(place: Path) -> None:
    """Empties the place; a replacement that was stopped between its two renames is finished."""
    target = place.with_name(place.name.removeprefix(".").removesuffix(SUFFIX))
    if (place / NEW).exists() and (place / OLD).exists() and not target.exists():
        (place / NEW).rename(target)
    for left in place.iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif left.name != LOCK:
            left.unlink(missing_ok=True)


def _leave(place: Path, lock: int) -> None:
    """Removes the place, its lock last: nobody else enters before it is empty."""
    try:
        _settle(place)
        (place / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody entered since
            place.rmdir()
    finally:
        os.close(lock)
