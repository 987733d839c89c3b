"""Objects of a bucket as files that are read by parts, and as the folder of a journal."""

from __future__ import annotations

import io
import posixpath
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow

from ip2p_ray import objects, s3
from ip2p_ray.errors import ConfigError, StorageError
from ip2p_ray.s3 import ATTEMPTS, SCHEME, split


class ObjectFile:
    """An object as a file that can be opened for reading, again and again."""

    def __init__(self, uri: str, place: str | None = None) -> None:
        self._uri = uri
        self.name = uri.rpartition("/")[2]
        """The last part of its key."""
        self.place = place or self.name
        """Where it lies, from the folder on that was asked for."""

    def __str__(self) -> str:
        return self._uri

    def beside(self, name: str) -> ObjectFile:
        """The file of that name, or at that path, in the same folder."""
        bucket, key = split(self._uri)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(key), name.lstrip("/")))
        return ObjectFile(f"{SCHEME}{bucket}/{path}")

    def open(self, mode: str = "rb") -> BinaryIO:
        """A stream that reads by parts and can seek.

        Raises:
            DatasetError: there is no such object.
            StorageError: it cannot be read.
        """
        if mode != "rb":
            raise ConfigError(f"an object is opened as rb, got {mode}")
        stream: Any = opened(self._uri)
        return stream


class ObjectFolder:
    """The objects below a URI, as `triplets.journal` keeps records in them."""

    def __init__(self, uri: str) -> None:
        split(uri)
        self._uri = uri.rstrip("/")

    def __str__(self) -> str:
        return self._uri

    def list(self) -> Iterator[tuple[str, int]]:
        """Name and length of each."""
        return ((found.name, found.bytes) for found in objects.listing(self._uri))

    def read(self, name: str, start: int) -> bytes:
        """One of them, from a byte on."""
        return objects.read(f"{self._uri}/{name}", start)

    def put(self, name: str, data: bytes) -> None:
        """Returns once it is there, whole."""
        objects.write(f"{self._uri}/{name}", data)


def is_refusal(error: OSError) -> bool:
    """Whether Arrow raised it because of what the store answered, or did not answer."""
    return "AWS Error" in str(error)


def opened(uri: str) -> BinaryIO:
    """The object as a file that Arrow reads by parts.

    Raises:
        DatasetError: there is no such object.
        StorageError: it cannot be read.
    """
    system, path = s3.filesystem(uri)
    try:
        stream: Any = _Stream(system.open_input_file(path))
    except OSError as error:
        # Arrow's text names no reason that could be told apart; boto3 meets the same one.
        bucket, key = split(uri)
        with s3.in_words(uri):
            s3.client().get_object(Bucket=bucket, Key=key)["Body"].close()
        raise StorageError(f"{uri} cannot be read: {error}") from error
    return stream


class _Stream(io.RawIOBase):
    """Arrow's file, a part of which is asked for again where Arrow gives up.

    It does at once where a refusal has a longer text than the part that was asked for.
    """

    def __init__(self, file: pyarrow.NativeFile) -> None:
        self._file, self._size, self._at = file, int(file.size()), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = self._part(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _part(self, size: int) -> bytes:
        for attempt in range(ATTEMPTS):
            try:
                return bytes(self._file.read_at(size, self._at)) if size else b""
            except OSError as error:
                if not is_refusal(error) or attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(min(0.05 * 2**attempt, 5.0))
        raise AssertionError("the last attempt returns or raises")
