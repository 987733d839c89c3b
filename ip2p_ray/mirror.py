"""Checkpoints copied to a bucket, and back where there are none: for disks that go with a node.

<uri>/step-00000012/unet.safetensors ...
<uri>/step-00000012/checksums.json        uploaded last: without it the rest is no checkpoint
<uri>/metrics.jsonl
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ip2p_ray import objects
from ip2p_ray.atomic import atomic_file, atomic_folder
from ip2p_ray.checkpoint import CHECKSUMS, FACTS, latest_checkpoint
from ip2p_ray.errors import ConfigError
from ip2p_ray.storage import join


def upload_checkpoint(folder: Path, uri: str, *, keep: int | None) -> None:
    """The checkpoint below the URI, whole or not there; the `keep` newest stay, None keeps all.

    Older ones, whole or not, are removed after it is whole, so that a failed upload costs none.

    Raises:
        StorageError: object storage refuses, or cannot be reached.
    """
    target = join(uri, folder.name)
    if folder.name not in _whole(uri):
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


def fetch_newest(uri: str, folder: Path, *, beside: str, recipe: str) -> Path | None:
    """The newest checkpoint of the URI, in `folder`, if it has none that is as new; else None.

    The file `beside` comes before it. `recipe` is what the run is made by.

    Raises:
        ConfigError: the checkpoints there are of a run that was made otherwise.
        StorageError: object storage refuses, or cannot be reached.
        DatasetError: a part of it is gone; named.
    """
    whole = _whole(uri)
    if whole:
        facts = json.loads(objects.read(join(uri, whole[-1], FACTS)))
        if facts["run"].get("recipe") != recipe:
            raise ConfigError(
                f"{uri} holds checkpoints of a run that was made differently, or of other data: "
                "give another --mirror"
            )
    here = latest_checkpoint(folder)
    if not whole or (here is not None and here.name >= whole[-1]):
        return None
    newest = whole[-1]
    folder.mkdir(parents=True, exist_ok=True)
    if objects.size(join(uri, beside)) is not None:
        with atomic_file(folder / beside) as file:
            objects.read_file(join(uri, beside), file)
    with atomic_folder(folder / newest) as new:
        objects.read_file(join(uri, newest, CHECKSUMS), new / CHECKSUMS)
        for name in json.loads((new / CHECKSUMS).read_bytes()):
            objects.read_file(join(uri, newest, name), new / name)
    return folder / newest


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
