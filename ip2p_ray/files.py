"""Rows of the files that people have: Parquet, JSON lines, CSV, TSV and plain text.

All but Parquet may be gzipped. Of a file only one batch of rows, and of those only the columns that
are asked for, are in memory. A file is a local path, or an object of a bucket (`storage.files_at`).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol, TextIO, overload, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_ray import parquet
from ip2p_ray.errors import DatasetError

TEXT = "text"
"""The one column of a plain text file (a row a line), and of JSON lines that are bare strings."""

Numbered = tuple[int, dict[str, Any]]

_Told = Mapping[str, None] | None  # the names of a row that is read leniently, None for no such

_BATCH = 1024
_ROWS_WITH_COLUMNS = 1000
_READ_AHEAD = 4 << 20  # bytes that are asked of a bucket at a time
_BROKEN = (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, pa.ArrowException)


@dataclass(frozen=True)
class Unread:
    """Stands for a value of a line that could not be read."""

    why: str

    def __repr__(self) -> str:
        return self.why


class File(Protocol):
    """What can be opened for reading again and again; a path is one."""

    @property
    def name(self) -> str:
        """Of the file, without its folder."""
        ...

    def open(self, mode: Literal["rb"], /) -> IO[bytes]:
        """Its bytes; can seek."""
        ...


@runtime_checkable
class Remote(File, Protocol):
    """A file that is no path, such as an object of a bucket."""

    @property
    def place(self) -> str:
        """Where it lies, from the folder on that was asked for."""
        ...

    def beside(self, name: str, /) -> File:
        """The file of that name, or at that path, in the same folder."""
        ...


@overload
def files_of(paths: Iterable[Path]) -> list[Path]: ...
@overload
def files_of(paths: Iterable[File]) -> list[File]: ...
def files_of(paths: Iterable[File]) -> Sequence[File]:
    """The files among the paths and, of folders, those below them that can be read, by name.

    Of a folder, files without a byte are left out if others have some.

    Raises:
        DatasetError: a path does not exist, is of an unknown kind, or is a folder without files.
    """
    found: list[File] = []
    for path in paths:
        if isinstance(path, Path) and path.is_dir():
            below = (part for part in path.rglob("*") if is_data(part.relative_to(path).parts))
            inside = sorted(part for part in below if part.is_file())
            # what writers leave for "nothing came"; alone it is told as what it is
            inside = [part for part in inside if part.stat().st_size] or inside
            if not inside:
                raise DatasetError(f"folder {path} holds no file of {', '.join(KINDS)}")
            found += inside
        elif isinstance(path, Path) and not path.exists():
            raise DatasetError(f"{path} cannot be read: there is no such file")
        elif _suffix(path) not in KINDS:
            raise DatasetError(f"{path} is of no known kind; known are {', '.join(KINDS)}")
        else:
            found.append(path)
    return found


def is_data(parts: Sequence[str]) -> bool:
    """Whether a file, by its path below a folder, is of a kind that can be read, and not hidden."""
    return not any(part[0] in "._" for part in parts) and _kind(parts[-1]) in KINDS


def beside(path: File, name: str) -> File:
    """The file of that name, or at that path, in the same folder."""
    if isinstance(path, Path):
        return path.parent / name
    assert isinstance(path, Remote)
    return path.beside(name)


def read(path: File) -> bytes:
    """All bytes of a file."""
    with path.open("rb") as file:
        return file.read()


def size(path: File) -> int:
    """Bytes of a file."""
    with _told(path), path.open("rb") as file:
        return file.seek(0, io.SEEK_END)


def columns(path: File) -> list[str]:
    """Names of a file's columns; of JSON lines, those of the first thousand lines.

    Raises:
        DatasetError: the file cannot be read.
    """
    if _suffix(path) == ".parquet":
        with _told(path), open_parquet(path, ()) as file:
            return list(file.schema_arrow.names)
    if _suffix(path) in _TABLES:
        with _told(path), _opened(path) as file:
            return next(csv.reader(file, **_TABLES[_suffix(path)]), [])
    if _suffix(path) == ".txt":
        return [TEXT]
    first = itertools.islice(read_rows(path, lenient=True), _ROWS_WITH_COLUMNS)
    found = list(dict.fromkeys(name for row in first for name in row))
    return found or list(next(read_rows(path), {TEXT: None}))


def read_rows(
    path: File, names: Sequence[str] = (), *, lenient: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of a file, of Parquet only with the columns `names`; empty lines are skipped.

    A row may lack some of the names: no two JSON lines need have the same. If `lenient`, a line of
    JSON or of a table that cannot be read is a row with `Unread` for each name.

    Raises:
        DatasetError: the file, or a line of it, cannot be read; says which.
    """
    return (row for _, row in read_numbered(path, names, lenient=lenient))


def read_numbered(
    path: File, names: Sequence[str] = (), *, batch: int = _BATCH, lenient: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same with the number of the line on which each row ends; of Parquet, of the row.

    `batch` rows of Parquet are in memory at a time; few, where they hold pictures.
    """
    if _suffix(path) not in KINDS:
        raise DatasetError(f"{path} is of no known kind; known are {', '.join(KINDS)}")
    reader = _LINES.get(_suffix(path))
    told = dict.fromkeys(names) if lenient else None
    with _told(path):
        yield from reader(path, told) if reader else _read_parquet(path, names, batch)


def _read_parquet(path: File, names: Sequence[str], rows: int) -> Iterator[Numbered]:
    count = 0
    with open_parquet(path, names) as file:
        for batch in file.iter_batches(rows, columns=list(names), use_threads=False):
            yield from enumerate(batch.to_pylist(), start=count + 1)
            count += len(batch)


def _read_table(path: File, told: _Told) -> Iterator[Numbered]:
    with _opened(path) as file:
        reader = csv.DictReader(file, **_TABLES[_suffix(path)])
        _ = reader.fieldnames  # without a header no row could be read
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                if told is None:
                    raise
                # the DictReader's own line_num is still that of the row before
                row = dict.fromkeys(told, Unread(f"{path}:{reader.reader.line_num}: {error}"))
            if row is None:
                return
            yield reader.reader.line_num, row


def _read_json_lines(path: File, told: _Told) -> Iterator[Numbered]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = _row_of_json(line, f"{path}:{number}")
            except DatasetError as error:
                if told is None:
                    raise
                row = dict.fromkeys(told, Unread(str(error)))
            yield number, row


def _read_text(path: File, _: _Told) -> Iterator[Numbered]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, {TEXT: line.rstrip("\r\n")}


def _row_of_json(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(f"{where}: not a line of JSON: {error}") from error
    if isinstance(value, str):
        return {TEXT: value}
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: neither an object nor a text: {line[:80].rstrip()}")
    return value


_TABLES: dict[str, dict[str, Any]] = {
    ".csv": {},
    # Published TSV files hold single quotation marks, which quoting would swallow rows by.
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_LINES: Mapping[str, Callable[[File, _Told], Iterator[Numbered]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".txt": _read_text,
}
KINDS = (".parquet", *_LINES)
"""Suffixes of what can be read."""


@contextmanager
def open_parquet(path: File, names: Sequence[str] | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file, of which a row group is not read whole before its first batch comes out.

    All its columns, or those `names`, are plain.
    """
    if isinstance(path, Path):
        with parquet.opened(path, names=names, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
    else:
        with (
            path.open("rb") as stream,
            parquet.opened(
                stream, path, names=names, pre_buffer=False, buffer_size=_READ_AHEAD
            ) as file,
        ):
            yield file


@contextmanager
def _opened(path: File) -> Iterator[TextIO]:
    """The text of a file, unpacked; only a line feed ends a line.

    A byte that is no UTF-8 becomes a replacement character, so that it costs one row at most.
    """
    with path.open("rb") as stream:
        raw: Any = stream if isinstance(path, Path) else io.BufferedReader(stream, _READ_AHEAD)
        content = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
        content = content if hasattr(content, "peek") else io.BufferedReader(content)
        if content.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DatasetError(f"{path} cannot be read: it is UTF-16; write it as UTF-8")
        with io.TextIOWrapper(content, "utf-8-sig", errors="replace", newline="\n") as text:
            yield text


@contextmanager
def _told(path: File) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _suffix(path: File) -> str:
    return _kind(path.name)


def _kind(name: str) -> str:
    """The suffix below .gz, in lower case; Parquet packs itself and has no .gz."""
    path = Path(name.lower())
    packed = path.suffix == ".gz" and Path(path.stem).suffix != ".parquet"
    return Path(path.stem).suffix if packed else path.suffix
