"""Published sets of edits to evaluate on, in the layouts in which they are distributed.

    MagicBrush   edit_sessions.json ({img_id: [{input, output, instruction, ...}, ...]}), its
                 global_descriptions.json ({img_id: {file: caption}}) and images/<img_id>/<file>;
                 or tables with source_img, instruction, target_img, img_id and turn_index
    Emu Edit     tables with image, instruction, input_caption, output_caption and task; no true
                 picture
    PIE-Bench    mapping_file.json ({key: {image_path, original_prompt, editing_prompt,
                 editing_instruction, editing_type_id, ...}}) and annotation_images/<image_path>;
                 no true picture; the brackets that mark the change in prompts are taken out
    ImgEdit      basic_edit.json ({key: {id, prompt, edit_type}}) and the pictures that `id` names,
                 beside it, in original_images/ or in singleturn/; no captions, no true picture
    any other    what `layouts` reads as pairs; the edited picture is the true one

Masks are passed over. Nothing is decoded here. A question without an instruction or a picture is
handed on as it is, for whoever takes questions drops single ones; what is of another kind than the
layout has (a number for a text, a list for an object) says that the file is no such set, and ends
it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ip2p_ray import files
from ip2p_ray.captions import one_line
from ip2p_ray.errors import DatasetError
from ip2p_ray.layouts import KINDS, PairFiles

Turns = Literal["single", "multi"]
"""Each turn of a session on its true input, or all turns one after the other on the first one."""

SESSIONS, DESCRIPTIONS = "edit_sessions.json", "global_descriptions.json"
MAPPINGS = ("mapping_file.json", "mapping_file_ti2i_benchmark.json")
BASIC_EDITS = "basic_edit.json"

PIE_TYPES = (
    *("random", "change object", "add object", "delete object", "change content", "change pose"),
    *("change color", "change material", "change background", "change style"),
)
"""PIE-Bench's editing_type_id, 0 to 9, in words."""

_EMU = ("image", "instruction", "input_caption", "output_caption")
_TURN = "turn_index"
_SESSION = "img_id"
_TOLD = 60  # characters of a wrong value


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question of a set, as it came; nothing about it has been checked."""

    place: str
    """What it is called there; different for every question of a set."""
    group: str
    """The same for questions about one picture, which are not independent."""
    instructions: tuple[str, ...]
    """What is to be done, one after the other; most sets ask one thing at a time. An empty one is
    not told."""
    source: bytes | files.File | None
    """The picture, encoded, or where it is; None where there is none."""
    truth: bytes | files.File | None = None
    """The right answer, where somebody made it."""
    caption: str | None = None
    edited_caption: str | None = None
    edit_type: str | None = None
    turn: int | None = None
    """Its place, from 1, among the questions of its group, where they build on one another."""


def read_edits(path: Path, *, turns: Turns = "single") -> Iterator[Asked]:
    """The questions of a set, in its order.

    With `turns` "multi", questions about one picture that build on one another are one question
    with several instructions, whose truth is the last one's. Only MagicBrush has such.

    Raises:
        DatasetError: nothing there is a known set, or the file that lists it is broken.
    """
    found: Iterator[Asked] = _any_layout(path)
    if turns == "single":
        return found
    if not _has_turns(path):
        raise DatasetError(
            f"{path} has no turns that build on one another; those of MagicBrush do "
            f"({SESSIONS}, or tables with {_SESSION} and {_TURN})"
        )
    return _sessions(found)


def inputs(path: Path) -> list[list[Any]]:
    """Name and size of each file that lists questions: what changes when they do.

    Raises:
        DatasetError: nothing there is a known set.
    """
    listed = _listed(path, (SESSIONS, *MAPPINGS, BASIC_EDITS))
    if listed is None and path.suffix == ".json":
        listed = path
    found = [listed] if listed is not None else _tables(path)
    if not found:
        return PairFiles(paths=(path,)).inputs()
    return [[part.relative_to(path.parent).as_posix(), part.stat().st_size] for part in found]


def _any_layout(path: Path) -> Iterator[Asked]:
    folder = path if path.is_dir() else path.parent
    if (listed := _listed(path, (SESSIONS,))) is not None:
        return _magic_brush(listed, folder)
    if (listed := _listed(path, MAPPINGS)) is not None:
        return _pie(listed, folder)
    if (listed := _listed(path, (BASIC_EDITS,))) is not None or path.suffix == ".json":
        return _img_edit(listed or path, folder)
    tables = _tables(path)
    emu = [part for part in tables if _is_emu(part)]
    if emu:
        return chain.from_iterable(_emu_edit(part) for part in emu)
    return _pairs(path, tables)


def _listed(path: Path, names: tuple[str, ...]) -> Path | None:
    """The file of one of these names: the path itself, or one in the folder that it is."""
    if path.name in names:
        return path
    return next((path / name for name in names if (path / name).is_file()), None)


def _magic_brush(listed: Path, folder: Path) -> Iterator[Asked]:
    captions: dict[str, Any] = {}
    described = folder / DESCRIPTIONS
    if described.is_file():
        captions = _objects(described, dict, "captions by their files")
    for session, turns in _objects(listed, list, "turns").items():
        own = captions.get(session, {})
        at = folder / "images" / session
        for number, turn in enumerate(turns, start=1):
            told = f"{listed}: turn {number} of {session}"
            source, truth = _text(turn, "input", told), _text(turn, "output", told)
            yield Asked(
                place=f"{session}/{number}",
                group=session,
                instructions=(_instruction(turn, "instruction", told),),
                source=at / source,
                truth=at / truth,
                caption=_optional(own, source, f"{described}: {session}"),
                edited_caption=_optional(own, truth, f"{described}: {session}"),
                turn=number,
            )


def _pie(listed: Path, folder: Path) -> Iterator[Asked]:
    for key, row in _objects(listed, dict, "the fields of a question").items():
        told = f"{listed}: {key}"
        image = _text(row, "image_path", told)
        yield Asked(
            place=key,
            group=image,
            instructions=(_instruction(row, "editing_instruction", told),),
            source=folder / "annotation_images" / image,
            caption=_unmarked(_optional(row, "original_prompt", told)),
            edited_caption=_unmarked(_optional(row, "editing_prompt", told)),
            edit_type=_pie_type(row.get("editing_type_id"), told),
        )


def _pie_type(value: Any, told: str) -> str | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise DatasetError(f"{told}: editing_type_id is no whole number: {_short(value)}")
    number = "" if value is None else str(value).strip()
    known = number.isdecimal() and int(number) < len(PIE_TYPES)
    return PIE_TYPES[int(number)] if known else number or None


def _img_edit(listed: Path, folder: Path) -> Iterator[Asked]:
    for key, row in _objects(listed, dict, "the fields of a question").items():
        told = f"{listed}: {key}"
        image = _text(row, "id", told)
        roots = (folder, folder / "original_images", folder / "singleturn")
        there = (root / image for root in roots if (root / image).is_file())
        yield Asked(
            place=key,
            group=image,
            instructions=(_instruction(row, "prompt", told),),
            source=next(there, folder / image),
            edit_type=_optional(row, "edit_type", told),
        )


def _emu_edit(table: Path) -> Iterator[Asked]:
    names = [*_EMU, *(name for name in ("task", "hash") if name in files.columns(table))]
    for number, row in files.read_numbered(table, names, batch=16):
        place, told = f"{table.name}:{number}", f"{table}:{number}"
        yield Asked(
            place=place,
            group=str(row.get("hash") or place),
            instructions=(_instruction(row, "instruction", told),),
            source=_picture(row.get("image"), table.parent),
            caption=_optional(row, "input_caption", told),
            edited_caption=_optional(row, "output_caption", told),
            edit_type=_optional(row, "task", told),
        )


def _pairs(path: Path, tables: list[Path]) -> Iterator[Asked]:
    """What `layouts` reads; where a table numbers its turns, named by them."""
    turns: dict[str, int] = {}
    for table in tables:
        if {_SESSION, _TURN} <= set(files.columns(table)):
            name = table.relative_to(path.parent).as_posix()
            for number, row in files.read_numbered(table, [_TURN]):
                turns[f"{name}:{number}"] = _turn(row.get(_TURN), f"{table}:{number}")
    for given in PairFiles(paths=(path,)):
        if given.unread is not None:
            raise DatasetError(f"{given.place} cannot be read: {given.unread}")
        group, turn = given.group or given.place, turns.get(given.place)
        texts = vars(given)
        yield Asked(
            place=given.place if turn is None else f"{group}/{turn}",
            group=group,
            instructions=(_instruction(texts, "instruction", given.place),),
            source=given.source,
            truth=given.edited,
            caption=_optional(texts, "caption", given.place),
            edited_caption=_optional(texts, "edited_caption", given.place),
            turn=turn,
        )


def _turn(value: Any, told: str) -> int:
    """The number of a turn; a table of text has it in digits."""
    number: float = math.nan
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = float(value)
    if not number.is_integer():
        raise DatasetError(f"{told}: {_TURN} is no whole number: {_short(value)}")
    return int(number)


def _has_turns(path: Path) -> bool:
    if _listed(path, (SESSIONS,)) is not None:
        return True
    if _listed(path, (*MAPPINGS, BASIC_EDITS)) is not None or path.suffix == ".json":
        return False
    return any({_SESSION, _TURN} <= set(files.columns(table)) for table in _tables(path))


def _sessions(questions: Iterator[Asked]) -> Iterator[Asked]:
    """One question a picture: its first input, all its instructions, the truth of the last."""
    by_group: dict[str, dict[int, Asked]] = defaultdict(dict)
    for asked in questions:
        if asked.turn is None:
            raise DatasetError(f"{asked.place} is no turn of a session: it has no {_TURN}")
        if asked.turn in by_group[asked.group]:
            raise DatasetError(f"session {asked.group} has turn {asked.turn} twice")
        by_group[asked.group][asked.turn] = asked
    for group, numbered in by_group.items():
        turns = [numbered[number] for number in sorted(numbered)]
        if sorted(numbered) != list(range(1, len(turns) + 1)):
            raise DatasetError(f"session {group} lacks a turn: it has {sorted(numbered)}")
        yield replace(
            turns[0],
            place=group,
            instructions=tuple(text for turn in turns for text in turn.instructions),
            truth=turns[-1].truth,
            edited_caption=turns[-1].edited_caption,
        )


def _tables(path: Path) -> list[Path]:
    """The tables at or below the path; none where the reference's generator left pairs."""
    if not path.exists():
        raise DatasetError(f"{path} does not exist")
    if path.is_dir() and next(path.rglob("prompt.json"), None) is not None:
        return []
    return [part for part in files.files_of([path]) if _kind(part) in KINDS]


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _is_emu(table: Path) -> bool:
    return set(_EMU) <= set(files.columns(table))


def _objects(path: Path, kind: type[Any], what: str) -> dict[str, Any]:
    """The JSON file's object, whose values are each an object of texts, or a list of such."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{path} holds no object of {what}, by name")
    for key, value in found.items():
        parts = value if isinstance(value, list) else [value]
        if not isinstance(value, kind) or not all(isinstance(part, dict) for part in parts):
            raise DatasetError(f"{path}: {key} does not hold {what}, but {_short(value)}")
    return found


def _text(row: Mapping[str, Any], name: str, told: str) -> str:
    """One that has to be there."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{told} has no {name}")
    return one_line(value)


def _instruction(row: Mapping[str, Any], name: str, told: str) -> str:
    """Empty where it is not told: one such question does not end the set."""
    return _optional(row, name, told) or ""


def _optional(row: Mapping[str, Any], name: str, told: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise DatasetError(f"{told}: {name} is no text: {_short(value)}")
    return one_line(value or "") or None


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= _TOLD else f"{told[:_TOLD]}..."


def _unmarked(prompt: str | None) -> str | None:
    return prompt and (one_line(prompt.replace("[", "").replace("]", "")) or None)


def _picture(value: Any, folder: Path) -> bytes | Path | None:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.strip():
        return folder / value.strip()
    return value if isinstance(value, bytes) and value else None
