"""Captions: read from a plain list, cleaned, and each dropped one with its reason.

Source: the reference draws captions from LAION-Aesthetics and skips a caption whose text or URL was
used before, within one process. Here that holds for the whole list; the cleaning is ours.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ip2p_ray.errors import DatasetError
from ip2p_ray.schema import caption_key

EMPTY = "empty_caption"
NO_LETTERS = "no_letters"
CONTAINS_URL = "contains_url"
TOO_LONG = "caption_too_long"
DUPLICATE = "duplicate_caption"
DUPLICATE_URL = "duplicate_url"

MAX_CHARACTERS = 400
"""More than any caption that CLIP's 77 tokens can hold in full."""

COLUMNS = ("caption", "input", "original_prompt", "input_text", "TEXT")
"""Names of the caption in published datasets, in the order in which they are looked for."""

_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_URL = re.compile(r"https?://|www\.", re.IGNORECASE)


def clean_caption(text: str) -> tuple[str, str | None]:
    """The caption on one line of printable text, and the reason to drop it or None."""
    plain = _TAG.sub(" ", html.unescape(text))
    caption = " ".join("".join(c for c in plain if c.isprintable() or c.isspace()).split())
    if not caption:
        return caption, EMPTY
    if not any(character.isalpha() for character in caption):
        return caption, NO_LETTERS
    if _URL.search(caption):
        return caption, CONTAINS_URL
    if len(caption) > MAX_CHARACTERS:
        return caption, TOO_LONG
    return caption, None


def collect(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """A row of `schema.CAPTIONS` for each row, in order, with the reason to drop it or None.

    Each row has a "caption" and may have a "url". Of equal captions, and of captions with one url,
    the first is kept.
    """
    captions: set[str] = set()
    urls: set[str] = set()
    for row in rows:
        caption, reason = clean_caption(row["caption"])
        url = row.get("url")
        if reason is None and caption in captions:
            reason = DUPLICATE
        if reason is None and url is not None and url in urls:
            reason = DUPLICATE_URL
        if reason is None:
            captions.add(caption)
            urls.update([url] if url is not None else [])
        yield {"caption_key": caption_key(caption), "caption": caption, "url": url}, reason


def read_captions(path: Path) -> Iterator[dict[str, Any]]:
    """Rows with "caption" and "url" of a text file (a caption a line) or of JSON lines.

    A JSON line is an object with one of COLUMNS and perhaps a url, or a bare string. Empty lines
    are skipped.

    Raises:
        DatasetError: the file cannot be read, or a line of it; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"captions {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            yield _row_of_json(line, f"{path}:{number}")
        else:
            yield {"caption": line, "url": None}


def _row_of_json(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not a line of JSON: {error}") from error
    fields = value if isinstance(value, dict) else {"caption": value}
    name = next((name for name in COLUMNS if name in fields), None)
    if name is None or not isinstance(fields[name], str):
        raise DatasetError(f"{where}: no text under any of {', '.join(COLUMNS)}; got {line[:80]}")
    url = fields.get("url", fields.get("URL"))
    return {"caption": fields[name], "url": url if isinstance(url, str) else None}
