"""Rows of the files that people have: Parquet, JSON lines, CSV, TSV and plain text.

All but Parquet may be gzipped. Of a file only one batch of rows, and of those only the columns that
are asked for, are in memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_ray.errors import DatasetError

TEXT = "text"
"""The one column of a plain text file (a row a line), and of JSON lines that are bare strings."""

Numbered = tuple[int, dict[str, Any]]

_BATCH = 1024
_BROKEN = (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, pa.ArrowException)


def files_of(paths: Iterable[Path]) -> list[Path]:
    """The files among the paths and, of folders, those below them that can be read, by name.

    Raises:
        DatasetError: a path does not exist, is of an unknown kind, or is a folder without files.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(part for part in path.rglob("*") if _is_data(part, path))
            if not inside:
                raise DatasetError(f"folder {path} holds no file of {', '.join(_KINDS)}")
            found += inside
        elif not path.exists():
            raise DatasetError(f"{path} cannot be read: there is no such file")
        elif _suffix(path) not in _KINDS:
            raise DatasetError(f"{path} is of no known kind; known are {', '.join(_KINDS)}")
        else:
            found.append(path)
    return found


def columns(path: Path) -> list[str]:
    """Names of a file's columns; of JSON lines, those of the first line.

    Raises:
        DatasetError: the file cannot be read.
    """
    if _suffix(path) == ".parquet":
        with _told(path):
            return list(pq.read_schema(path).names)
    if _suffix(path) in _TABLES:
        with _told(path), _opened(path) as file:
            return next(csv.reader(file, **_TABLES[_suffix(path)]), [])
    return list(next(read_rows(path), {TEXT: None}))


def read_rows(path: Path, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a file, of Parquet only with the columns `names`; empty lines are skipped.

    A row may lack some of the names: no two JSON lines need have the same.

    Raises:
        DatasetError: the file, or a line of it, cannot be read; says which.
    """
    return (row for _, row in read_numbered(path, names))


def read_numbered(
    path: Path, names: Sequence[str] = (), *, batch: int = _BATCH
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same with the number of the line on which each row ends; of Parquet, of the row.

    `batch` rows of Parquet are in memory at a time; few, where they hold pictures.
    """
    if _suffix(path) not in _KINDS:
        raise DatasetError(f"{path} is of no known kind; known are {', '.join(_KINDS)}")
    reader = _LINES.get(_suffix(path))
    with _told(path):
        yield from reader(path) if reader else _read_parquet(path, names, batch)


def _read_parquet(path: Path, names: Sequence[str], rows: int) -> Iterator[Numbered]:
    # Without pre_buffer a row group is not read whole before its first batch comes out.
    count = 0
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(rows, columns=list(names), use_threads=False):
            yield from enumerate(batch.to_pylist(), start=count + 1)
            count += len(batch)


def _read_table(path: Path) -> Iterator[Numbered]:
    with _opened(path) as file:
        reader = csv.DictReader(file, **_TABLES[_suffix(path)])
        yield from ((reader.line_num, row) for row in reader)


def _read_json_lines(path: Path) -> Iterator[Numbered]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _row_of_json(line, f"{path}:{number}")


def _read_text(path: Path) -> Iterator[Numbered]:
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
_LINES: Mapping[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".txt": _read_text,
}
_KINDS = (".parquet", *_LINES)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The text of a file, unpacked; only a line feed ends a line."""
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        yield file


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _suffix(path: Path) -> str:
    """The suffix below .gz, in lower case; Parquet packs itself and has no .gz."""
    name = Path(path.name.lower())
    packed = name.suffix == ".gz" and Path(name.stem).suffix != ".parquet"
    return Path(name.stem).suffix if packed else name.suffix


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(part[0] in "._" for part in path.relative_to(folder).parts)
    return not hidden and path.is_file() and _suffix(path) in _KINDS
