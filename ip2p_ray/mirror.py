"""Checkpoints in a bucket, copied there from a disk and back: for disks that go with a node.

<uri>/step-00000012/unet.safetensors ...
<uri>/step-00000012/checksums.json        uploaded last: without it the rest is no checkpoint
<uri>/metrics.jsonl
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

from ip2p_ray import objects
from ip2p_ray.atomic import atomic_file, atomic_folder, one_at_a_time, remove_folder
from ip2p_ray.checkpoint import CHECKSUMS, FACTS, FILES, is_sound, latest_checkpoint
from ip2p_ray.errors import ConfigError, DatasetError
from ip2p_ray.storage import abort_uploads, join

logger = logging.getLogger(__name__)


def upload_checkpoint(folder: Path, uri: str, *, keep: int | None) -> None:
    """The checkpoint below the URI, whole or not there; the `keep` newest stay, None keeps all.

    What killed processes were uploading there goes first; nobody else writes there.
    Older ones, whole or not, are removed after it is whole, so that a failed upload costs none.

    Raises:
        StorageError: object storage refuses, or cannot be reached.
    """
    target = join(uri, folder.name)
    if folder.name not in _whole(uri):
        abort_uploads(uri)
        names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
        for name in (*names, CHECKSUMS):
            objects.write_file(join(target, name), folder / name)
    stay = [] if keep is None else [*_whole(uri)[-keep:], folder.name]
    for old in _steps(uri) if stay else []:
        if old < max(stay) and old not in stay:
            objects.remove([join(uri, old, CHECKSUMS)])  # from here on it is none
            objects.remove_below(join(uri, old))


def upload_file(path: Path, uri: str) -> None:
    """The file below the URI, under its own name."""
    objects.write_file(join(uri, path.name), path)


def upload_folder(folder: Path, uri: str, *, last: str) -> None:
    """The folder's files below the URI, in place of what is there; that named `last` comes last.

    So the URI has it only while everything else is there whole.
    """
    abort_uploads(uri)
    objects.remove([join(uri, last)])
    objects.remove_below(uri)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path == folder / last):
        objects.write_file(join(uri, path.relative_to(folder).as_posix()), path)


def newest(uri: str) -> str | None:
    """The name of the newest whole checkpoint of the URI, such as step-00000012."""
    whole = _whole(uri)
    return whole[-1] if whole else None


def fetch_newest(uri: str, folder: Path, *, beside: str, recipe: str) -> Path | None:
    """The newest sound checkpoint of the URI, in `folder`; None if it has one that is as new.

    The file `beside` comes before it. `recipe` is what the run is made by. Broken ones that are
    newer are none from then on: their CHECKSUMS are deleted.

    Raises:
        ConfigError: the checkpoints there are of a run that was made otherwise.
        StorageError: object storage refuses, or cannot be reached.
        DatasetError: all are broken, and none is here; says what is wrong with the newest.
    """
    here = latest_checkpoint(folder)

    def take(name: str) -> Path:
        if here is not None and here.name >= name:
            return here
        _fetch_file(uri, folder, beside)
        return _fetch(uri, name, folder)

    taken = _newest_sound(uri, recipe, take, otherwise=here)
    return None if taken == here else taken


def fetch_alone(uri: str, folder: Path, *, beside: str | None, recipe: str) -> Path | None:
    """The newest sound checkpoint of the URI as the only one in `folder`; None if it has none.

    What the bucket lacks, or has otherwise, does not count and is removed. The file `beside` is
    the bucket's too. Several processes may do this with one folder. Broken ones as `fetch_newest`.

    Raises:
        As `fetch_newest`.
    """

    def take(name: str) -> Path:
        if _is_copy(folder / name, join(uri, name)):
            return folder / name
        return _fetch(uri, name, folder)

    with one_at_a_time(folder.with_name(f"{folder.name}.lock")):
        folder.mkdir(exist_ok=True)
        if beside is not None:
            _fetch_file(uri, folder, beside)
        found = _newest_sound(uri, recipe, take)
        for there in sorted(folder.glob("step-*")):
            if there != found:
                remove_folder(there)
        return found


def _newest_sound(
    uri: str, recipe: str, take: Callable[[str], Path], *, otherwise: Path | None = None
) -> Path | None:
    """What `take` makes of the newest checkpoint that it raises no DatasetError of.

    Newer ones are none from then on. Where there is no such checkpoint it is `otherwise`.
    """
    broken: dict[str, DatasetError] = {}
    taken = None
    for name in reversed(_whole(uri)):
        try:
            _require_recipe(uri, name, recipe)
            taken = take(name)
            break
        except DatasetError as error:
            broken[name] = error
    if broken and taken is None and otherwise is None:
        reason = next(iter(broken.values()))
        raise DatasetError(
            f"every checkpoint in {uri} is broken ({reason}); delete them to train again"
        ) from reason
    for name, reason in broken.items():
        logger.warning("%s; goes on at the one before", reason)
        objects.remove([join(uri, name, CHECKSUMS)])
    return taken or otherwise


def _require_recipe(uri: str, name: str, recipe: str) -> None:
    try:
        found = json.loads(objects.read(join(uri, name, FACTS)))["run"].get("recipe")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{join(uri, name, FACTS)} cannot be read: {error}") from error
    if found != recipe:
        raise ConfigError(
            f"{uri} holds checkpoints of a run that was made differently, or of other data: "
            "give another --mirror, or --out"
        )


def _is_copy(folder: Path, uri: str) -> bool:
    """Whether the checkpoint is there and that of the URI, and no disk has lost some of it."""
    try:
        sums = (folder / CHECKSUMS).read_bytes()
    except OSError:
        return False
    return sums == objects.read(join(uri, CHECKSUMS)) and is_sound(folder)


def _fetch_file(uri: str, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if objects.size(join(uri, name)) is not None:
        with atomic_file(folder / name) as file:
            objects.read_file(join(uri, name), file)


def _fetch(uri: str, name: str, folder: Path) -> Path:
    """The checkpoint, whole and as its checksums say.

    Raises:
        DatasetError: it is broken.
    """
    with atomic_folder(folder / name) as new:
        for part in (CHECKSUMS, *FILES):  # never what it lists itself, which may lie anywhere
            objects.read_file(join(uri, name, part), new / part)
        if _listed(new) != set(FILES) or not is_sound(new):
            raise DatasetError(f"{join(uri, name)} differs from its checksums")
    return folder / name


def _listed(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / CHECKSUMS).read_bytes()))
    except (ValueError, TypeError):
        return set()


def _whole(uri: str) -> list[str]:
    """Names of the whole checkpoints below the URI, the newest last."""
    return _steps(uri, [CHECKSUMS])


def _steps(uri: str, rest: list[str] | None = None) -> list[str]:
    """Names of the folders of steps that hold anything, or just this file, the newest last."""
    parts = (found.name.split("/") for found in objects.listing(uri))
    found = {
        part[0]
        for part in parts
        if re.fullmatch(r"step-\d{8,}", part[0]) and rest in (None, part[1:])
    }
    return sorted(found, key=lambda name: int(name.removeprefix("step-")))
