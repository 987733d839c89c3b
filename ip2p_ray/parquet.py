"""Parquet and Arrow files as this package opens them: columns of plain types only.

A file may give a column an extension type. Ray Data registers some, of which one unpickles every
value that is looked at, so that whoever wrote the file has chosen what runs. Types are therefore
checked before a value is touched, and the rest of the package opens such files nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_ray.errors import DatasetError

_NAME = b"ARROW:extension:name"  # where a type stands that this process has not registered


def opened(
    source: Any, where: object = None, *, names: Iterable[str] | None = None, **options: Any
) -> pq.ParquetFile:
    """The file, of which all columns, or those `names`, are plain; `where` names what has no path.

    Raises:
        DatasetError: a column has an extension type; names file, column and type.
        OSError, pyarrow.ArrowException: it is no whole Parquet file.
    """
    with _described(where or source):
        file = pq.ParquetFile(source, **options)
    try:
        require_plain(file.schema_arrow, where or source, names)
    except DatasetError:
        file.close()
        raise
    return file


def read_schema(
    source: Any, where: object = None, *, names: Iterable[str] | None = None
) -> pa.Schema:
    """The schema of a file that `opened` takes."""
    with opened(source, where, names=names) as file:
        return file.schema_arrow


def read_table(source: Any, where: object = None, **options: Any) -> pa.Table:
    """As pyarrow.parquet's, of a file that `opened` takes."""
    read_schema(source, where)
    return pq.read_table(source, **options)


def opened_arrow(source: Any, where: object) -> pa.RecordBatchFileReader:
    """A file of Arrow's own format, as `opened` opens Parquet."""
    with _described(where):
        file = pa.ipc.open_file(source)
        require_plain(file.schema, where)
    return file


def require_plain(schema: pa.Schema, where: object, names: Iterable[str] | None = None) -> None:
    """Returns if no column, or none of those `names`, has an extension type, at any depth.

    Raises:
        DatasetError: one has; names `where` it lies, the column and the type.
    """
    kept = None if names is None else set(names)
    for field in schema:
        found = _extension(field) if kept is None or field.name in kept else None
        if found is not None:
            raise DatasetError(
                f"{where}: column {field.name} has the extension type {found}, which could run "
                "code when it is read; write it as a plain type"
            )


@contextmanager
def _described(where: object) -> Iterator[None]:
    """Refuses types whose description Ray cannot read; its own text advises to unpickle it."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, pa.ArrowException):
            raise
        raise DatasetError(
            f"{where}: a column has an extension type that cannot be read; write it as a plain type"
        ) from None


def _extension(field: pa.Field) -> str | None:
    """The first extension type of a field or of what is nested in it."""
    if field.metadata and _NAME in field.metadata:
        return field.metadata[_NAME].decode("utf-8", "replace")
    return _extension_of(field.type)


def _extension_of(kind: pa.DataType) -> str | None:
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _extension_of(kind.value_type)
    nested = (_extension(kind.field(place)) for place in range(kind.num_fields))
    return next(filter(None, nested), None)
