"""What a finished dataset lacks of what it was made from, and what it has twice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError, DatasetError
from ip2p_ray.places import Places
from ip2p_ray.schema import pair_key

MADE_FROM = {
    "replies": ("captions",),
    "triplets": ("replies", "captions"),
    "candidates": ("queue", "triplets"),
    "scores": ("candidates",),
    "pairs": ("candidates", "scores"),
    "latents": ("pairs",),
}
"""What each dataset may be made from, the nearest first."""

_KEY = {
    **dict.fromkeys(("captions", "replies", "triplets"), "caption_key"),
    **dict.fromkeys(("queue", "candidates"), "triplet_key"),
    **dict.fromkeys(("scores", "pairs", "latents"), "pair_key"),
}
_ROWS = 4096
_NAMED = 5
_LACKING, _THERE = 0, 1


@dataclass(frozen=True, kw_only=True)
class Completeness:
    """How the keys of a dataset compare with those wanted."""

    wanted: int
    """Keys."""
    lost: int
    """Of them, that are not there."""
    duplicate: int
    """Rows whose key another row has."""
    unexpected: int
    """Keys that are there and are not wanted."""
    missing: tuple[str, ...] = ()
    """Some of the lost keys."""


def compare(wanted: Callable[[], Iterable[str]], found: Iterable[str]) -> Completeness:
    """How the keys that were found compare with those wanted, which are asked for twice at most.

    In memory are some 50 bytes a key.
    """
    places = Places()
    for key in wanted():
        places.put(_digest(key), _LACKING)
    count = lost = len(places)
    duplicate = unexpected = 0
    for key in found:
        digest = _digest(key)
        known = places.get(digest)
        duplicate += known == _THERE
        lost -= known == _LACKING
        unexpected += known is None
        places.put(digest, _THERE)
    missing: Iterator[str] = (key for key in wanted() if places.get(_digest(key)) == _LACKING)
    return Completeness(
        wanted=count,
        lost=lost,
        duplicate=duplicate,
        unexpected=unexpected,
        missing=tuple(itertools.islice(missing, _NAMED)) if lost else (),
    )


def check(uri: str, source: str | None = None) -> tuple[str, Completeness]:
    """What the dataset was compared with, and how it compares.

    `source` is what it was made from, by default the dataset of that name beside it. Of triplets
    and their rejects together each caption is wanted once.

    Raises:
        DatasetError: one of the two is not there or not whole.
        ConfigError: it is no dataset that is made from another, or not from that one.
    """
    dataset = storage.read_manifest(uri).dataset
    names = MADE_FROM.get(dataset)
    if names is None:
        told = ", ".join(MADE_FROM)
        raise ConfigError(f"{uri} is a dataset of {dataset}; those that can be checked: {told}")
    source = source or _beside(uri, names)
    found_in = storage.read_manifest(source).dataset
    if found_in not in names:
        told = " or ".join(names)
        raise ConfigError(f"{source} is a dataset of {found_in}; {dataset} are made from {told}")
    return source, compare(lambda: _wanted(source, found_in, dataset, uri), _found(uri, dataset))


def recomputed(ledger: Path) -> int:
    """How often a key was made that had been made before, by a file with a line for each time.

    The lines are JSON objects with a `key`, as `testing.pairs.SleepingGenerator` writes them. One
    that a kill has cut is not counted.

    Raises:
        DatasetError: it cannot be read, or has other lines.
    """
    places, lines = Places(), 0
    try:
        with ledger.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    lines += 1
                    places.put(_digest(json.loads(line)["key"]), _THERE)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DatasetError(
            f"{ledger} cannot be read as lines of JSON with a key: {error}"
        ) from error
    return lines - len(places)


def _beside(uri: str, names: tuple[str, ...]) -> str:
    above = storage.absolute(uri).rstrip("/").rpartition("/")[0]
    places = [storage.join(above, name) for name in names]
    for place in places:
        if storage.exists(storage.join(place, storage.MANIFEST)):
            return place
    raise DatasetError(f"{uri}: there is no {' or '.join(places)}; say what it was made from")


def _wanted(source: str, found_in: str, dataset: str, uri: str) -> Iterator[str]:
    """The keys that the dataset should have, by what it was made from."""
    if found_in == "candidates":
        yield from _candidates(source, kept=dataset == "pairs")
    elif found_in == "scores":
        for key, reason in _columns(source, "pair_key", "reason"):
            if reason is None:
                yield key
    elif dataset == "latents":
        held_out = storage.read_manifest(uri).config.get("split") == "all"
        for key, split in _columns(source, "pair_key", "split"):
            if held_out or split == "train":
                yield key
    else:
        yield from (key for (key,) in _columns(source, _KEY[dataset]))


def _found(uri: str, dataset: str) -> Iterator[str]:
    if dataset == "triplets":
        above, _, name = storage.absolute(uri).rstrip("/").rpartition("/")
        rejects = storage.join(above, "rejects", name)
        yield from (key for (key,) in _columns(rejects, "key"))
    yield from (key for (key,) in _columns(uri, _KEY[dataset]))


def _candidates(uri: str, *, kept: bool) -> Iterator[str]:
    """The pair keys of all candidates, or of those that were kept."""
    inside = [f"candidates.list.element.{name}" for name in ("index", "reason")]
    for key, name, candidates in _columns(
        uri, "triplet_key", "recipe", "candidates", read=["triplet_key", "recipe", *inside]
    ):
        for candidate in candidates:
            if not kept or candidate["reason"] is None:
                yield pair_key(key, candidate["index"], name)


def _columns(uri: str, *names: str, read: list[str] | None = None) -> Iterator[tuple[Any, ...]]:
    """Some columns of a whole dataset, row by row."""
    for shard in storage.read_manifest(uri).shards:
        place = storage.join(uri, shard.name)
        try:
            with storage.open_parquet(place) as file:
                for batch in file.iter_batches(_ROWS, columns=read or list(names)):
                    yield from zip(*(batch[name].to_pylist() for name in names), strict=True)
        except (OSError, LookupError, pa.ArrowException) as error:
            raise DatasetError(f"shard {place} cannot be read: {error}") from error


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
