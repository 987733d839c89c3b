"""Triplets that others have written: prompt files, read directly instead of asking a writer.

The column names are those of the reference's prompt files and image datasets, of UltraEdit's, and
ours. What is wrong with a row is said as of a reply to its caption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ip2p_ray import files
from ip2p_ray.captions import (
    NOT_TEXT,
    UNSAMPLED,
    CaptionConfig,
    clean_caption,
    one_line,
    surely_fits,
)
from ip2p_ray.captions import reason_by as caption_reason
from ip2p_ray.distinct import NOT_SAMPLED, REPEATED, keep_distinct
from ip2p_ray.errors import DatasetError
from ip2p_ray.triplets.prompt import completion
from ip2p_ray.triplets.reply import DUPLICATE, Triplet, parse_reply

CAPTION_COLUMNS = ("caption", "input", "original_prompt", "input_text")
INSTRUCTION_COLUMNS = ("instruction", "edit", "edit_prompt", "edit_instruction")
EDITED_CAPTION_COLUMNS = ("edited_caption", "output", "edited_prompt", "output_text")


@dataclass(frozen=True, kw_only=True)
class TripletFiles:
    """Rows with the three texts and "source" of many files; can be iterated again and again."""

    paths: tuple[files.File, ...]
    """Files, or folders of them, of the kinds that `files` reads."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path, names in [(path, columns_of(path)) for path in files.files_of(self.paths)]:
            for row in files.read_rows(path, names, lenient=True):
                yield {**texts_of(row, names), "source": path.name}


def columns_of(path: files.File) -> tuple[str, str, str]:
    """The columns of a file that hold caption, instruction and edited caption.

    Raises:
        DatasetError: the file cannot be read, or lacks one of them; names those there are.
    """
    there = files.columns(path)
    names = triplet_columns(there)
    if names is None:
        raise DatasetError(
            f"{path} is no file of triplets: it has {', '.join(there) or 'no columns'}, not one "
            f"each of {', '.join(CAPTION_COLUMNS)}; {', '.join(INSTRUCTION_COLUMNS)}; "
            f"{', '.join(EDITED_CAPTION_COLUMNS)}"
        )
    return names


def triplet_columns(names: Sequence[str]) -> tuple[str, str, str] | None:
    """Which of a file's columns hold caption, instruction and edited caption, or None."""
    found = [
        next((name for name in known if name in names), None)
        for known in (CAPTION_COLUMNS, INSTRUCTION_COLUMNS, EDITED_CAPTION_COLUMNS)
    ]
    caption, instruction, edited_caption = found
    if caption is None or instruction is None or edited_caption is None:
        return None
    return caption, instruction, edited_caption


def texts_of(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The three texts of a row under this package's names, whatever they are."""
    caption, instruction, edited_caption = (row.get(name) for name in names)
    return {"caption": caption, "instruction": instruction, "edited_caption": edited_caption}


def collect(
    rows: Iterable[Mapping[str, Any]],
    config: CaptionConfig | None = None,
    *,
    fits: Callable[[str], bool] | None = None,
) -> Iterator[tuple[Triplet, str | None]]:
    """The triplet of each row, in order, with the reason to drop it or None.

    The reasons are those of `captions.collect`, of `reply.parse_reply`, and DUPLICATE: of captions
    and instructions that are equal but for case one is kept. The rows are read twice.
    """
    config = config or CaptionConfig()
    whole = fits or surely_fits

    def judge(found: tuple[Triplet, str | None]) -> str | None:
        triplet, reason = found
        if reason is not None:
            return reason
        written = completion(triplet.instruction, triplet.edited_caption)
        parsed = parse_reply(triplet.caption, written, fits=whole)
        if isinstance(parsed, str):
            return parsed
        return caption_reason(triplet.caption, config, whole)

    def identify(found: tuple[Triplet, str | None]) -> tuple[str, str | None]:
        triplet = found[0]
        return f"{triplet.caption}\n{triplet.instruction}".casefold(), triplet.edited_caption

    for (triplet, _), reason in keep_distinct(
        rows,
        _clean,
        judge,
        identify,
        {REPEATED: DUPLICATE, NOT_SAMPLED: UNSAMPLED},
        sample=config.sample,
        seed=config.seed,
        one_a_place=False,
    ):
        yield triplet, reason


def _clean(row: Mapping[str, Any]) -> tuple[Triplet, str | None]:
    """The triplet with each text on one line, and what is wrong with one of the texts alone."""
    caption, reason = clean_caption(row["caption"])
    edited_caption, other = clean_caption(row["edited_caption"])
    instruction = row["instruction"]
    if instruction is not None and not isinstance(instruction, str):
        reason, instruction = reason or NOT_TEXT, repr(instruction)
    triplet = Triplet(caption, one_line(instruction or ""), edited_caption)
    # That the edited caption is empty has a name of its own.
    return triplet, reason or (other if edited_caption else None)
