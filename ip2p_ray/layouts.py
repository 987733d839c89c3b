"""Pairs of pictures with instructions, in the layouts in which people have them.

Tables (Parquet, JSON lines, CSV, TSV) with columns for the source, the instruction and the edited
picture: the published five columns, fusing/instructpix2pix-1000-samples, MagicBrush (whose masks
are passed over), ours. A picture is bytes, a struct of bytes and path, or the path of a file
relative to the table. And folders as the reference's generator leaves them:

    <root>/<prompt>/prompt.json            its texts
    <root>/<prompt>/<seed>_0.jpg, _1.jpg   source and edited picture
    <root>/<prompt>/metadata.jsonl         what each seed was made with, and its similarities
    <root>/seeds.json                      [[prompt, [seed, ...]], ...]; may be missing

Nothing is decoded here, and files of pictures are not even opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from ip2p_ray import files
from ip2p_ray.errors import DatasetError
from ip2p_ray.triplets.published import (
    CAPTION_COLUMNS,
    EDITED_CAPTION_COLUMNS,
    INSTRUCTION_COLUMNS,
)

SOURCE_COLUMNS = ("source_image", "original_image", "input_image", "source_img")
EDITED_COLUMNS = ("edited_image", "target_image", "output_image", "target_img")
GROUP_COLUMNS = ("img_id",)
"""Names of a column whose equal values mean one picture and what was made of it."""

KINDS = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")

METADATA = {
    "seed": "seed",
    "p2p_threshold": "self_replace",
    "cfg_scale": "guidance_scale",
    "clip_sim_0": "caption_similarity",
    "clip_sim_1": "edited_caption_similarity",
    "clip_sim_image": "image_similarity",
    "clip_sim_dir": "direction_similarity",
}
"""Keys of metadata.jsonl, with our names of them."""

_PICTURE = re.compile(r"(\d+)_0\.(jpe?g|png|webp)", re.IGNORECASE)
_ROWS = 16  # of Parquet in memory at a time


@dataclass(frozen=True, kw_only=True)
class Given:
    """One row as it came; nothing about it has been checked."""

    place: str
    """Where it is: file and row or line, or folder and seed."""
    source: bytes | files.File | None
    """The picture before the edit, encoded; None where there is none."""
    edited: bytes | files.File | None
    """The picture after the edit."""
    instruction: Any
    caption: Any = None
    edited_caption: Any = None
    group: str | None = None
    """The same for rows that show one thing."""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """Draws and similarities that came with the row, by our names."""
    unread: str | None = None
    """Why the row cannot be read, if so; then nothing else of it is known but its place."""


@dataclass(frozen=True, kw_only=True)
class PairColumns:
    """Which columns of a table hold what."""

    source: str
    instruction: str
    edited: str
    caption: str | None
    edited_caption: str | None
    group: str | None

    @classmethod
    def of(cls, names: Sequence[str]) -> PairColumns | None:
        """Those of a table with columns of these names, None if it holds no pairs."""

        def first(known: Sequence[str]) -> str | None:
            return next((name for name in known if name in names), None)

        source, edited = first(SOURCE_COLUMNS), first(EDITED_COLUMNS)
        instruction = first(INSTRUCTION_COLUMNS)
        if source is None or instruction is None or edited is None:
            return None
        return cls(
            source=source,
            instruction=instruction,
            edited=edited,
            caption=first(CAPTION_COLUMNS),
            edited_caption=first(EDITED_CAPTION_COLUMNS),
            group=first(GROUP_COLUMNS),
        )


@dataclass(frozen=True)
class _Table:
    path: files.File
    name: str

    def __iter__(self) -> Iterator[Given]:
        names = _columns(self.path)
        wanted = [name for name in vars(names).values() if name is not None]
        lines = self.path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        for number, row in files.read_numbered(self.path, wanted, batch=_ROWS, lenient=True):
            place = f"{self.name}:{number}"
            broken = row.get(names.source)
            if isinstance(broken, files.Unread):
                yield Given(
                    place=place, source=None, edited=None, instruction=None, unread=broken.why
                )
                continue
            # No two JSON lines need have the same names.
            own = PairColumns.of(list(row)) or names if lines else names
            group = row.get(own.group or "")
            yield Given(
                place=place,
                source=_picture(row.get(own.source), self.path),
                edited=_picture(row.get(own.edited), self.path),
                instruction=row.get(own.instruction),
                caption=row.get(own.caption or ""),
                edited_caption=row.get(own.edited_caption or ""),
                group=None if group is None else f"{own.group}={group}",
            )

    def inputs(self) -> list[list[Any]]:
        _columns(self.path)
        return [[self.name, files.size(self.path)]]


@dataclass(frozen=True)
class _Prompts:
    """A folder as the reference's generator leaves it."""

    root: Path

    def __iter__(self) -> Iterator[Given]:
        for name, seeds in self._seeds():
            folder = self.root / name
            texts = _texts(folder / "prompt.json")
            metadata = _metadata(folder / "metadata.jsonl")
            for seed in seeds:
                yield Given(
                    place=f"{self.root.name}/{name}/{seed}",
                    source=_file(folder, f"{seed}_0"),
                    edited=_file(folder, f"{seed}_1"),
                    made_with=metadata.get(seed, {"seed": seed}),
                    **texts,
                )

    def inputs(self) -> list[list[Any]]:
        pairs = self._seeds()
        return [[self.root.name, len(pairs), sum(len(seeds) for _, seeds in pairs)]]

    def _seeds(self) -> list[tuple[str, list[int]]]:
        """The folders of prompts with the seeds of their pairs."""
        listed = self.root / "seeds.json"
        if not listed.is_file():
            prompts = sorted(self.root.rglob("prompt.json"))
            found = [(path.parent, _seeds_in(path.parent)) for path in prompts]
            return [(at.relative_to(self.root).as_posix(), seeds) for at, seeds in found if seeds]
        try:
            content = json.loads(listed.read_text(encoding="utf-8"))
            return [(str(name), [_whole(seed) for seed in seeds]) for name, seeds in content]
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise DatasetError(
                f"{listed} does not hold [[folder, [seed, ...]], ...]: {error}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class PairFiles:
    """The rows of files and folders, in their order; can be iterated again and again."""

    paths: tuple[files.File, ...]
    """Tables, and local folders of them or roots of the reference's layout."""

    def __iter__(self) -> Iterator[Given]:
        for source in self._sources():
            yield from source

    def inputs(self) -> list[list[Any]]:
        """Name and size of each input: what changes when it does.

        Raises:
            DatasetError: one is missing, unreadable, or holds no pairs; says which, and why.
        """
        return [told for source in self._sources() for told in source.inputs()]

    def _sources(self) -> Iterator[_Table | _Prompts]:
        for path in self.paths:
            if isinstance(path, Path) and path.is_dir() and _is_prompts(path):
                yield _Prompts(path)
                continue
            found = [part for part in files.files_of([path]) if _kind(part) in KINDS]
            if not found:
                raise DatasetError(
                    f"{path} holds no table ({', '.join(KINDS)}) and no folders with prompt.json"
                )
            yield from (_Table(part, _place(part, path)) for part in found)


def _place(part: files.File, path: files.File) -> str:
    """Where a table lies, from the folder on that was asked for."""
    if isinstance(part, Path) and isinstance(path, Path):
        return part.relative_to(path.parent).as_posix()
    assert isinstance(part, files.Remote)
    return part.place


def _columns(path: files.File) -> PairColumns:
    """The columns of a table of pairs.

    Raises:
        DatasetError: the file cannot be read, or holds no pairs; names what it has.
    """
    there = files.columns(path)
    names = PairColumns.of(there)
    if names is None:
        raise DatasetError(
            f"{path} holds no pairs: it has {', '.join(there) or 'no columns'}, not one each of "
            f"{', '.join(SOURCE_COLUMNS)}; {', '.join(INSTRUCTION_COLUMNS)}; "
            f"{', '.join(EDITED_COLUMNS)}"
        )
    if _kind(path) == ".parquet":
        with files.open_parquet(path, ()) as file:
            schema = file.schema_arrow
        for name in (names.source, names.edited):
            if not _is_picture(schema.field(name).type):
                raise DatasetError(
                    f"{path}: column {name} is {schema.field(name).type}; pictures are bytes, "
                    "paths, or structs of bytes and path"
                )
    return names


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(place).name in ("bytes", "path") for place in range(len(kind)))
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string)
    return any(test(kind) for test in (*tests, pa.types.is_large_string))


def _picture(value: Any, table: files.File) -> bytes | files.File | None:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.strip():
        return files.beside(table, value.strip())
    return value if isinstance(value, bytes) and value else None


def _is_prompts(folder: Path) -> bool:
    """Whether the folder has the reference's layout, itself or one level below (its shards)."""
    return (folder / "seeds.json").is_file() or any(
        next(folder.glob(pattern), None) for pattern in ("*/prompt.json", "*/*/prompt.json")
    )


def _seeds_in(folder: Path) -> list[int]:
    found = (_PICTURE.fullmatch(path.name) for path in folder.iterdir())
    return sorted({int(match[1]) for match in found if match})


def _file(folder: Path, stem: str) -> Path:
    kinds = ("jpg", "jpeg", "png", "webp")
    there = (folder / f"{stem}.{kind}" for kind in kinds)
    return next((path for path in there if path.is_file()), folder / f"{stem}.jpg")


def _texts(path: Path) -> dict[str, Any]:
    """The three texts of a prompt, None where the file does not say."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None  # without an instruction each of its pairs is rejected
    content = content if isinstance(content, dict) else {}
    names = {"caption": CAPTION_COLUMNS, "instruction": INSTRUCTION_COLUMNS}
    names["edited_caption"] = EDITED_CAPTION_COLUMNS
    return {
        ours: next((content[name] for name in known if name in content), None)
        for ours, known in names.items()
    }


def _whole(value: Any) -> int:
    """The integer that a value stands for; a ValueError where it is a fraction."""
    whole = int(value)
    if not isinstance(value, str) and whole != value:
        raise ValueError(f"{value!r} is no whole number")
    return whole


def _metadata(path: Path) -> dict[int, dict[str, Any]]:
    """What is known of each seed; lines that cannot be read say nothing.

    A line whose seed is a fraction is that of the pair with the whole part of it, unless that has
    a line of its own: whoever checks the pair finds what is wrong.
    """
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    for line in lines:
        try:
            content = json.loads(line)
            seed = content["seed"]
            number = int(seed)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
        exact = isinstance(seed, str) or seed == number
        if exact or number not in found:
            row = {ours: content.get(name) for name, ours in METADATA.items()}
            found[number] = row | {"seed": number if exact else seed}
    return found


def _kind(path: files.File) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix
