"""Objects of a bucket: written, read, listed, deleted; `s3` says how the bucket is reached.

An object is seen from the moment its upload is complete, and is whole then; so a kill leaves none
that is cut.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import botocore.exceptions
from boto3.s3.transfer import TransferConfig

from ip2p_ray import s3
from ip2p_ray.errors import DatasetError, StorageError
from ip2p_ray.s3 import ATTEMPTS, MISSING, SCHEME, UNREACHABLE, code_of, in_words, split

_PART_BYTES = 16 << 20
_DELETE = 1000  # the most that one request may name
_CONDITION_FAILED = {"PreconditionFailed", "412"}
_CONFLICT = {"ConditionalRequestConflict", "409"}


class Found(NamedTuple):
    """An object below a URI."""

    name: str
    """What follows the URI and its slash."""
    bytes: int
    tag: str = ""
    """What changes whenever the object does."""


def check(uri: str) -> None:
    """Returns if the bucket can be listed; soon, so that no job begins in vain.

    Raises:
        StorageError: no such bucket, no right to it, or nobody there; says which.
    """
    bucket, key = split(uri)
    with in_words(uri):
        s3.client(3).list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)


def read(uri: str, start: int = 0) -> bytes:
    """The object from byte `start` on, which is before its end.

    Raises:
        DatasetError: there is no such object.
        StorageError: it cannot be read.
    """
    return _read(uri, {"Range": f"bytes={start}-"} if start else {})[0]


def read_tagged(uri: str) -> tuple[bytes, str] | None:
    """The object and its tag, of the same moment; None if there is none.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return _read(uri, {})
    except DatasetError:
        return None


def _read(uri: str, part: dict[str, str]) -> tuple[bytes, str]:
    bucket, key = split(uri)
    for attempt in range(ATTEMPTS):
        with in_words(uri):
            answer = s3.client().get_object(Bucket=bucket, Key=key, **part)
            try:
                data: bytes = answer["Body"].read()
            except UNREACHABLE:  # boto3 repeats only what fails before the first byte
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(min(0.05 * 2**attempt, 5.0))
            else:
                return data, str(answer["ETag"])
    raise AssertionError("the last attempt returns or raises")


def write(uri: str, data: bytes) -> None:
    """The object, whole once this returns; one that was there is replaced at that moment.

    Raises:
        StorageError: it cannot be written; what was there before is there still.
    """
    bucket, key = split(uri)
    with in_words(uri):
        if len(data) <= _PART_BYTES:
            s3.client().put_object(Bucket=bucket, Key=key, Body=data)
            return
        # by parts, which no one sees before all of them have come
        parts = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES)
        s3.client().upload_fileobj(io.BytesIO(data), bucket, key, Config=parts)


def write_file(uri: str, path: Path) -> None:
    """As `write`, of a file that need not fit into memory."""
    bucket, key = split(uri)
    parts = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES)
    with in_words(uri):
        s3.client().upload_file(str(path), bucket, key, Config=parts)


def read_file(uri: str, path: Path) -> None:
    """The object as a file, which is made or replaced and may be cut if this fails.

    Raises:
        DatasetError: there is no such object.
        StorageError: it cannot be read.
    """
    bucket, key = split(uri)
    with in_words(uri):
        try:
            s3.client().download_file(bucket, key, str(path))
        except botocore.exceptions.ClientError as error:
            if error.operation_name == "HeadObject" and code_of(error) in ("400", "403"):
                _item(uri)  # a refused HEAD does not say why it is, a refused listing does
            raise


def write_if(uri: str, data: bytes, expected: str | None) -> str | None:
    """The tag of the object, written only if the one there has the tag `expected` (None: if none).

    None if it was not written, because another lies there or none does.

    Raises:
        StorageError: it cannot be written, or others were being written at every attempt.
    """
    bucket, key = split(uri)
    condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
    for attempt in range(ATTEMPTS):
        with in_words(uri):
            try:
                answer = s3.client().put_object(Bucket=bucket, Key=key, Body=data, **condition)
            except botocore.exceptions.ClientError as error:
                if code_of(error) in _CONDITION_FAILED | MISSING:
                    return None
                # another write was under way, which tells nothing of how it ends
                if code_of(error) not in _CONFLICT or attempt + 1 == ATTEMPTS:
                    raise
            else:
                return str(answer["ETag"])
        time.sleep(min(0.02 * 2**attempt, 0.5))
    raise AssertionError("the last attempt returns or raises")


def tag(uri: str) -> str | None:
    """What changes whenever the object does; None if there is none."""
    item = _item(uri)
    return None if item is None else str(item["ETag"])


def size(uri: str) -> int | None:
    """The length of the object; None if there is none."""
    item = _item(uri)
    return None if item is None else int(item["Size"])


def remove(uris: Iterable[str]) -> None:
    """Deletes objects of one bucket; those that are gone already do not matter."""
    batch: list[str] = []
    for uri in uris:
        batch.append(uri)
        if len(batch) == _DELETE:
            _remove(batch)
            batch = []
    if batch:
        _remove(batch)


def remove_below(uri: str) -> None:
    """Deletes all objects below a URI, and those that consoles and Arrow make for folders."""
    bucket, key = split(uri)
    with in_words(uri):
        pages = s3.client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=f"{key}/" if key else ""):
            _delete(bucket, [item["Key"] for item in page.get("Contents", ())])


def listing(uri: str) -> Iterator[Found]:
    """The objects below a URI in the order of their keys; a page of 1000 is in memory."""
    bucket, key = split(uri)
    prefix = f"{key}/" if key else ""
    with in_words(uri):
        pages = s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for page in pages:
            for item in page.get("Contents", ()):
                name = item["Key"].removeprefix(prefix)
                if name and not name.endswith("/"):  # what consoles make for an empty folder
                    yield Found(name, int(item["Size"]), str(item["ETag"]))


def folders(uri: str) -> Iterator[str]:
    """The first parts of names below a URI that have more; what lies deeper is not listed."""
    bucket, key = split(uri)
    prefix = f"{key}/" if key else ""
    with in_words(uri):
        pages = s3.client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            for item in page.get("CommonPrefixes", ()):
                yield item["Prefix"].removeprefix(prefix).rstrip("/")


def abort_uploads(uri: str) -> int:
    """How many uploads by parts below a URI were begun and not ended; from here on there are none.

    A process that was killed leaves them: no one sees them, but they are stored and paid for.

    Raises:
        StorageError: object storage refuses, or cannot be reached.
    """
    bucket, key = split(uri)
    count = 0
    with in_words(uri):
        pages = s3.client().get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=bucket, Prefix=f"{key}/" if key else ""):
            for begun in page.get("Uploads", ()):
                try:
                    s3.client().abort_multipart_upload(
                        Bucket=bucket, Key=begun["Key"], UploadId=begun["UploadId"]
                    )
                except botocore.exceptions.ClientError as error:
                    if code_of(error) not in MISSING | {"NoSuchUpload"}:  # it has ended meanwhile
                        raise
                else:
                    count += 1
    return count


def _item(uri: str) -> dict[str, Any] | None:
    """What the listing says of the object."""
    bucket, key = split(uri)
    with in_words(uri):  # a refused HEAD would not say why it is
        answer = s3.client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
    return next((item for item in answer.get("Contents", ()) if item["Key"] == key), None)


def _remove(uris: list[str]) -> None:
    bucket, _ = split(uris[0])
    with in_words(uris[0]):
        _delete(bucket, [split(uri)[1] for uri in uris])


def _delete(bucket: str, keys: Sequence[str]) -> None:
    if not keys:
        return
    named = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    answer = s3.client().delete_objects(Bucket=bucket, Delete=named)
    for failed in answer.get("Errors", ())[:1]:
        raise StorageError(
            f"{SCHEME}{bucket}/{failed['Key']} cannot be deleted: {failed.get('Message')}"
        )
