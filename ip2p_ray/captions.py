"""Captions: read from files as people have them, cleaned, and each dropped one with its reason.

Source: the reference draws captions from LAION-Aesthetics and skips a caption whose text or URL was
used before, within one process and in the order of reading. Here that holds for all rows of all
files, whatever their order; the cleaning is ours.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ip2p_ray import files
from ip2p_ray.distinct import NOT_SAMPLED, REPEATED, SAME_PLACE, keep_distinct
from ip2p_ray.errors import ConfigError, DatasetError
from ip2p_ray.language import is_english
from ip2p_ray.schema import caption_key

EMPTY = "empty_caption"
NOT_TEXT = "not_text"
NO_LETTERS = "no_letters"
CONTAINS_URL = "contains_url"
MARKUP = "markup"
FILE_NAME = "file_name"
PLACEHOLDER = "placeholder"
TOO_LONG = "caption_too_long"
WRONG_LANGUAGE = "wrong_language"
DUPLICATE = "duplicate_caption"
DUPLICATE_URL = "duplicate_url"
UNSAMPLED = "not_sampled"

REASONS = (
    EMPTY,
    NOT_TEXT,
    NO_LETTERS,
    CONTAINS_URL,
    MARKUP,
    FILE_NAME,
    PLACEHOLDER,
    TOO_LONG,
    WRONG_LANGUAGE,
    DUPLICATE,
    DUPLICATE_URL,
    UNSAMPLED,
)
"""Every reason, in the order in which they are looked for."""

MAX_CHARACTERS = 400
"""More than any caption that CLIP's 77 tokens can hold in full."""

MAX_TOKENS = 77
"""What CLIP's text encoder reads, start and end included."""

COLUMNS = ("caption", "input", "original_prompt", "input_text", "TEXT", files.TEXT)
"""Names of the caption in published datasets, in the order in which they are looked for."""

URL_COLUMNS = ("url", "URL", "image_url")
"""The same of the picture's address."""

SOURCE_COLUMNS = ("source",)
"""The same of where a row came from; the name of the file where there is none."""

_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_URL = re.compile(r"https?://|www\.", re.IGNORECASE)
_LEFTOVER = re.compile(
    r"""</?[a-z!]                              # a tag that is never closed
    | &(?:[a-z]{2,8}|\#x?[0-9a-f]{1,6});       # an entity that was escaped twice
    | \{\{ | \}\} | \{% | %\} | <% | %> | \$\{ | \{[a-z_.0-9]*\}           # templates
    | \[/?(?:caption|gallery|embed|img|url|quote|b|i)\b[^\]]*\]             # shortcodes
    | %[sd]\b | %[0-9a-f]{2}                   # formats and URL escapes
    | \b(?:href|src|alt|onclick|class)\s*= | \bfunction\s*\( | \bdisplay\s*:\s*(?:none|block|inline)
    | lorem\ ipsum""",
    re.IGNORECASE | re.VERBOSE,
)
_FILE = re.compile(
    r"\S+\.(?:jpe?g|png|gif|webp|tiff?|bmp|svg|heic|pdf|mp4)"
    r"|(?:img|dsc[nf]?|pict?|image|photo|screen ?shot|scan)[-_ ]?\d[-_\d]*",
    re.IGNORECASE,
)
_NOTHING = re.compile(
    r"(?:an? )?(?:image|img|photo|picture|pic|thumbnail|icon|logo|untitled|null|none|nan|undefined"
    r"|n/a|default|caption|no caption|alt|alt text|title|description|no description"
    r"|image placeholder|placeholder|no image(?: available)?|click to enlarge)\W*",
    re.IGNORECASE,
)
_PIECES = re.compile(r"[a-z]+|[^\sa-z]", re.IGNORECASE)
_LETTERS_A_TOKEN = 4  # CLIP's vocabulary has most common words whole; names may need this many


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Which captions are kept."""

    sample: int | None = None
    """Number of captions, drawn from what passed all rules; None keeps them all."""
    seed: int = 0
    """Of the sample, in [0, 2**63); the order of the rows and their files does not matter."""
    language: Literal["en"] | None = None
    """Drops what `language.is_english` does not take for English; None keeps any language."""

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise ConfigError(f"sample is at least 1 or None, got {self.sample}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed lies in [0, 2**63), got {self.seed}")
        if self.language not in (None, "en"):
            raise ConfigError(f"language is en or None, got {self.language!r}")


@dataclass(frozen=True, kw_only=True)
class CaptionFiles:
    """Rows with "caption", "url" and "source" of many files; can be iterated again and again."""

    paths: tuple[files.File, ...]
    """Files, or folders of them, of the kinds that `files` reads."""
    column: str | None = None
    """The caption's; None looks for one of COLUMNS."""
    url_column: str | None = None
    """The URL's; None looks for one of URL_COLUMNS and does without."""
    source_column: str | None = None
    """The source's; None looks for one of SOURCE_COLUMNS and takes the file's name else."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path, names in [(path, self.columns(path)) for path in files.files_of(self.paths)]:
            caption, url, source = names
            for row in files.read_rows(path, [name for name in names if name], lenient=True):
                yield {
                    "caption": row.get(caption),
                    "url": _known(row.get(url)) if url else None,
                    "source": (_known(row.get(source)) if source else None) or path.name,
                }

    def columns(self, path: files.File) -> tuple[str, str | None, str | None]:
        """The names of caption, URL and source in a file; the last two may be missing.

        Raises:
            DatasetError: it cannot be read, or lacks the caption or a column that was asked for;
                names those there are.
        """
        there = files.columns(path)
        caption = _column(path, there, self.column, COLUMNS)
        if caption is None:
            raise DatasetError(
                f"{path} has none of the columns {', '.join(COLUMNS)}; it has: "
                f"{', '.join(there) or 'none'}; say which holds the caption"
            )
        url = _column(path, there, self.url_column, URL_COLUMNS)
        return caption, url, _column(path, there, self.source_column, SOURCE_COLUMNS)


def read_captions(path: files.File) -> Iterator[dict[str, Any]]:
    """The rows of `CaptionFiles` of one file or folder, the column found by its name.

    The caption of a line that cannot be read is no text: it says which line, and why not.

    Raises:
        DatasetError: the file cannot be read; says which.
    """
    return iter(CaptionFiles(paths=(path,)))


def collect(
    rows: Iterable[Mapping[str, Any]],
    config: CaptionConfig | None = None,
    *,
    fits: Callable[[str], bool] | None = None,
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """A row of `schema.COLLECTED_CAPTIONS` for each row, in order, with the reason to drop it.

    Each row has a "caption" and may have a "url" and a "source". Of captions that are equal but for
    case, and of captions with one url, one is kept. The rows are read twice, so a list will
    do and a generator will not; in memory are 33 bytes of each. `fits` says whether an encoder
    reads a whole caption (`Clip.fits`); without it `surely_fits` does, which may drop one that
    just fits.

    Raises:
        ConfigError: the rows can be read only once.
        DatasetError: the rows were not the same the second time.
    """
    config = config or CaptionConfig()
    whole = fits or surely_fits

    def clean(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        caption, reason = clean_caption(row["caption"])
        found = {"caption_key": caption_key(caption), "caption": caption}
        return {**found, "url": row.get("url"), "source": row.get("source")}, reason

    for (found, _), reason in keep_distinct(
        rows,
        clean,
        lambda found: found[1] or reason_by(found[0]["caption"], config, whole),
        lambda found: (found[0]["caption"].casefold(), found[0]["url"]),
        {REPEATED: DUPLICATE, SAME_PLACE: DUPLICATE_URL, NOT_SAMPLED: UNSAMPLED},
        sample=config.sample,
        seed=config.seed,
    ):
        yield found, reason


def clean_caption(value: Any) -> tuple[str, str | None]:
    """The caption on one line of printable text, and the reason to drop it or None.

    What is not text is given back as a text that shows it.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None:
        return "", EMPTY
    if not isinstance(value, str):
        return repr(value)[:MAX_CHARACTERS], NOT_TEXT
    caption = one_line(_TAG.sub(" ", html.unescape(value)))
    if not caption:
        return caption, EMPTY
    if not any(character.isalpha() for character in caption):
        return caption, NO_LETTERS
    if _URL.search(caption):
        return caption, CONTAINS_URL
    if _LEFTOVER.search(caption):
        return caption, MARKUP
    if _FILE.fullmatch(caption):
        return caption, FILE_NAME
    if _NOTHING.fullmatch(caption):
        return caption, PLACEHOLDER
    if len(caption) > MAX_CHARACTERS:
        return caption, TOO_LONG
    return caption, None


def one_line(text: str) -> str:
    """The text without what cannot be printed, and with single spaces between its words."""
    return " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())


def surely_fits(text: str) -> bool:
    """Whether CLIP reads the whole text, by a count that is rather too high than too low.

    It needs no vocabulary, and so refuses some texts that would just fit: four letters, a digit, a
    sign, and every byte of other scripts are a token each.
    """
    tokens = sum(
        -(-len(piece) // _LETTERS_A_TOKEN) if piece.isascii() else len(piece.encode())
        for piece in _PIECES.findall(text)
    )
    return tokens + 2 <= MAX_TOKENS


def reason_by(caption: str, config: CaptionConfig, fits: Callable[[str], bool]) -> str | None:
    """The reason to drop a clean caption that a setting gives."""
    if not fits(caption):
        return TOO_LONG
    if config.language == "en" and not is_english(caption):
        return WRONG_LANGUAGE
    return None


def _column(
    path: files.File, there: Sequence[str], asked: str | None, known: Sequence[str]
) -> str | None:
    if asked is None:
        return next((name for name in known if name in there), None)
    if asked not in there:
        raise DatasetError(f"{path} has no column {asked!r}; it has: {', '.join(there) or 'none'}")
    return asked


def _known(value: Any) -> str | None:
    """A value of a column of texts that may be missing."""
    return value if isinstance(value, str) and value.strip() else None
