"""Objects of a bucket at whatever speaks S3: AWS, MinIO, Ceph and the like.

An object is seen from the moment its upload is complete, and is whole then; so a kill leaves none
that is cut. Endpoint, region and credentials are where boto3 looks for them: AWS_ENDPOINT_URL or
AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_ACCESS_KEY_ID and the like, AWS_PROFILE, the pod's role. Of an
endpoint that is named the path style of addresses is used. Whole objects go through boto3; files
that are read by parts go through Arrow, which looks in the same places.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions
import pyarrow.fs
from boto3.s3.transfer import TransferConfig

from ip2p_ray.errors import ConfigError, DatasetError, StorageError

SCHEME = "s3://"

ATTEMPTS = 10
"""Of each request, with jittered pauses of up to 20 s between them; AWS_MAX_ATTEMPTS is another."""

_TIMEOUT_S = 60.0
_impatience: ContextVar[float | None] = ContextVar("impatience", default=None)

_PART_BYTES = 16 << 20
_DELETE = 1000  # the most that one request may name
_MISSING = {"NoSuchKey", "404", "NotFound"}
_CONDITION_FAILED = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_UNREACHABLE = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
)


class Found(NamedTuple):
    """An object below a URI."""

    name: str
    """What follows the URI and its slash."""
    bytes: int
    tag: str = ""
    """What changes whenever the object does."""


def is_object(uri: object) -> bool:
    """Whether it names something in a bucket."""
    return isinstance(uri, str) and uri.startswith(SCHEME)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key; the key may be empty.

    Raises:
        ConfigError: it names no bucket.
    """
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not is_object(uri) or not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,254}", bucket):
        raise ConfigError(f"{uri} names no bucket: give s3://bucket/folder")
    return bucket, key.strip("/")


def check(uri: str) -> None:
    """Returns if the bucket can be listed; soon, so that no job begins in vain.

    Raises:
        StorageError: no such bucket, no right to it, or nobody there; says which.
    """
    bucket, key = split(uri)
    with _told(uri):
        _client(_settings(), 3).list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)


@contextmanager
def impatient(timeout_s: float) -> Iterator[None]:
    """Of the block's requests in this thread, each is tried twice, `timeout_s` each time."""
    before = _impatience.set(timeout_s)
    try:
        yield
    finally:
        _impatience.reset(before)


def read(uri: str, start: int = 0) -> bytes:
    """The object from byte `start` on, which is before its end.

    Raises:
        DatasetError: there is no such object.
        StorageError: it cannot be read.
    """
    bucket, key = split(uri)
    part = {"Range": f"bytes={start}-"} if start else {}
    for attempt in range(ATTEMPTS):
        with _told(uri):
            answer = _s3().get_object(Bucket=bucket, Key=key, **part)
            try:
                data: bytes = answer["Body"].read()
            except _UNREACHABLE:  # boto3 repeats only what fails before the first byte
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(min(0.05 * 2**attempt, 5.0))
            else:
                return data
    raise AssertionError("the last attempt returns or raises")


def write(uri: str, data: bytes) -> None:
    """The object, whole once this returns; one that was there is replaced at that moment.

    Raises:
        StorageError: it cannot be written; what was there before is there still.
    """
    bucket, key = split(uri)
    with _told(uri):
        if len(data) <= _PART_BYTES:
            _s3().put_object(Bucket=bucket, Key=key, Body=data)
            return
        # by parts, which no one sees before all of them have come
        parts = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES)
        _s3().upload_fileobj(io.BytesIO(data), bucket, key, Config=parts)


def write_file(uri: str, path: Path) -> None:
    """As `write`, of a file that need not fit into memory."""
    bucket, key = split(uri)
    parts = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES)
    with _told(uri):
        _s3().upload_file(str(path), bucket, key, Config=parts)


def read_file(uri: str, path: Path) -> None:
    """The object as a file, which is made or replaced and may be cut if this fails.

    Raises:
        DatasetError: there is no such object.
        StorageError: it cannot be read.
    """
    bucket, key = split(uri)
    with _told(uri):
        try:
            _s3().download_file(bucket, key, str(path))
        except botocore.exceptions.ClientError as error:
            if error.operation_name == "HeadObject" and _code(error) in ("400", "403"):
                _item(uri)  # a refused HEAD does not say why it is, a refused listing does
            raise


def write_if(uri: str, data: bytes, expected: str | None) -> str | None:
    """The tag of the object, written only if the one there has the tag `expected` (None: if none).

    None if it was not written, because another lies there or none does.
    """
    bucket, key = split(uri)
    condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
    with _told(uri):
        try:
            answer = _s3().put_object(Bucket=bucket, Key=key, Body=data, **condition)
        except botocore.exceptions.ClientError as error:
            if _code(error) in _CONDITION_FAILED | _MISSING:
                return None
            raise
    return str(answer["ETag"])


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
    with _told(uri):
        pages = _s3().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=f"{key}/" if key else ""):
            _delete(bucket, [item["Key"] for item in page.get("Contents", ())])


def listing(uri: str) -> Iterator[Found]:
    """The objects below a URI in the order of their keys; a page of 1000 is in memory."""
    bucket, key = split(uri)
    prefix = f"{key}/" if key else ""
    with _told(uri):
        pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for page in pages:
            for item in page.get("Contents", ()):
                name = item["Key"].removeprefix(prefix)
                if name and not name.endswith("/"):  # what consoles make for an empty folder
                    yield Found(name, int(item["Size"]), str(item["ETag"]))


def folders(uri: str) -> Iterator[str]:
    """The first parts of names below a URI that have more; what lies deeper is not listed."""
    bucket, key = split(uri)
    prefix = f"{key}/" if key else ""
    with _told(uri):
        pages = _s3().get_paginator("list_objects_v2")
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
    with _told(uri):
        pages = _s3().get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=bucket, Prefix=f"{key}/" if key else ""):
            for begun in page.get("Uploads", ()):
                try:
                    _s3().abort_multipart_upload(
                        Bucket=bucket, Key=begun["Key"], UploadId=begun["UploadId"]
                    )
                except botocore.exceptions.ClientError as error:
                    if _code(error) not in _MISSING | {"NoSuchUpload"}:  # it has ended meanwhile
                        raise
                else:
                    count += 1
    return count


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
        return ((found.name, found.bytes) for found in listing(self._uri))

    def read(self, name: str, start: int) -> bytes:
        """One of them, from a byte on."""
        return read(f"{self._uri}/{name}", start)

    def put(self, name: str, data: bytes) -> None:
        """Returns once it is there, whole."""
        write(f"{self._uri}/{name}", data)


def is_refusal(error: OSError) -> bool:
    """Whether Arrow raised it because of what the store answered, or did not answer."""
    return "AWS Error" in str(error)


def opened(uri: str) -> BinaryIO:
    """The object as a file that Arrow reads by parts.

    Raises:
        DatasetError: there is no such object.
        StorageError: it cannot be read.
    """
    system, path = filesystem(uri)
    try:
        stream: Any = _Stream(system.open_input_file(path))
    except OSError as error:
        # Arrow's text names no reason that could be told apart; boto3 meets the same one.
        bucket, key = split(uri)
        with _told(uri):
            _s3().get_object(Bucket=bucket, Key=key)["Body"].close()
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


def filesystem(uri: str) -> tuple[pyarrow.fs.S3FileSystem, str]:
    """Arrow's file system for a URI, and the path in it."""
    bucket, key = split(uri)
    return _arrow(_settings(), bucket), f"{bucket}/{key}" if key else bucket


def _item(uri: str) -> dict[str, Any] | None:
    """What the listing says of the object."""
    bucket, key = split(uri)
    with _told(uri):  # a refused HEAD would not say why it is
        answer = _s3().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
    return next((item for item in answer.get("Contents", ()) if item["Key"] == key), None)


def _remove(uris: list[str]) -> None:
    bucket, _ = split(uris[0])
    with _told(uris[0]):
        _delete(bucket, [split(uri)[1] for uri in uris])


def _delete(bucket: str, keys: Sequence[str]) -> None:
    if not keys:
        return
    named = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    answer = _s3().delete_objects(Bucket=bucket, Delete=named)
    for failed in answer.get("Errors", ())[:1]:
        raise StorageError(
            f"{SCHEME}{bucket}/{failed['Key']} cannot be deleted: {failed.get('Message')}"
        )


def _settings() -> tuple[tuple[str, str], ...]:
    """All that changes who is asked and as whom: other settings, another client."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


def _s3() -> Any:
    timeout_s = _impatience.get()
    if timeout_s is not None:
        return _client(_settings(), 2, timeout_s)
    return _client(_settings(), ATTEMPTS)


@lru_cache(maxsize=8)
def _client(
    settings: tuple[tuple[str, str], ...], attempts: int, timeout_s: float | None = None
) -> Any:
    told = dict(settings)
    options: dict[str, Any] = {}
    if timeout_s is not None or "AWS_MAX_ATTEMPTS" not in told:
        options["retries"] = {"total_max_attempts": attempts, "mode": "standard"}
    if _endpoint_told(told) and "AWS_REQUEST_CHECKSUM_CALCULATION" not in told:
        # Not every server that speaks S3 knows the checksums that AWS has added.
        options["request_checksum_calculation"] = "when_required"
    config = botocore.config.Config(
        connect_timeout=min(10.0, timeout_s or _TIMEOUT_S),
        read_timeout=timeout_s or _TIMEOUT_S,
        max_pool_connections=32,
        **options,
    )
    region = told.get("AWS_REGION")  # boto3 itself reads only AWS_DEFAULT_REGION
    try:
        return boto3.session.Session(region_name=region).client("s3", config=config)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise ConfigError(f"object storage is not set up: {_plain(error)}") from error


@lru_cache(maxsize=8)
def _arrow(settings: tuple[tuple[str, str], ...], bucket: str) -> pyarrow.fs.S3FileSystem:
    client = _client(settings, ATTEMPTS)
    told = dict(settings)
    attempts = int(told.get("AWS_MAX_ATTEMPTS", ATTEMPTS))
    options: dict[str, Any] = {"region": client.meta.region_name}
    endpoint = str(client.meta.endpoint_url)
    if not endpoint.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        scheme, _, host = endpoint.partition("://")
        options |= {"endpoint_override": host.rpartition("@")[2].rstrip("/"), "scheme": scheme}
    else:
        with _told(f"{SCHEME}{bucket}"):
            # Arrow does not follow a bucket into its region.
            found = client.head_bucket(Bucket=bucket)
            options["region"] = found.get("BucketRegion") or client.meta.region_name
    # What is small is one request then, of which a kill leaves nothing.
    options |= {"connect_timeout": 10, "allow_delayed_open": True}
    return _retrying(attempts, options)


class _Retrying(pyarrow.fs.S3FileSystem):  # type: ignore[misc]
    """Arrow's, which on its way to another process would forget how often it is to try."""

    attempts: int

    def __reduce__(self) -> Any:
        _, (options,) = super().__reduce__()
        return _retrying, (self.attempts, options)


def _retrying(attempts: int, options: dict[str, Any]) -> _Retrying:
    retry = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=attempts)
    system = _Retrying(retry_strategy=retry, **options)
    system.attempts = attempts
    return system


def _endpoint_told(settings: dict[str, str]) -> bool:
    return any(name in settings for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"))


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


_REFUSALS = {
    **dict.fromkeys(
        ("AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"),
        "access is denied: the credentials in use have no right to it",
    ),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthFailure"),
        "the credentials are refused; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
        "AWS_SESSION_TOKEN",
    ),
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"),
        "the credentials have expired; renew them and run the same command again",
    ),
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "301"),
        "the bucket lies in another region; set AWS_REGION to it",
    ),
    **dict.fromkeys(
        ("SlowDown", "ServiceUnavailable", "503", "RequestLimitExceeded", "ThrottlingException"),
        "the store kept answering that it is overloaded; run the same command again later",
    ),
}


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """What boto3 raises as one sentence of this package's."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        raise _refused(uri, error) from error
    except botocore.exceptions.NoCredentialsError as error:
        raise ConfigError(
            f"{uri}: there are no credentials for object storage; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the pod a role"
        ) from error
    except _UNREACHABLE as error:
        raise StorageError(
            f"{uri}: the object storage at {_where()} cannot be reached, or hangs up "
            f"({type(error).__name__}); check AWS_ENDPOINT_URL and the network"
        ) from error
    except (
        botocore.exceptions.BotoCoreError,
        boto3.exceptions.Boto3Error,
        RuntimeError,  # botocore's for credentials that were refreshed and have expired still
    ) as error:
        met = error.__context__  # what a transfer of a file met, of which it tells in its own way
        if isinstance(met, botocore.exceptions.ClientError):
            raise _refused(uri, met) from error
        raise StorageError(f"{uri}: {_plain(error)}") from error


def _refused(uri: str, error: botocore.exceptions.ClientError) -> DatasetError | StorageError:
    code = _code(error)
    if code in _MISSING:
        return DatasetError(f"{uri} cannot be read: there is no such object")
    if code == "NoSuchBucket":
        bucket, _ = split(uri)
        return StorageError(f"{uri}: there is no bucket {bucket} at {_where()}")
    reason = _REFUSALS.get(code)
    if reason is None:
        message = error.response.get("Error", {}).get("Message", "")
        reason = f"{error.operation_name} failed: {code} {message}".strip()
    return StorageError(f"{uri}: {reason}")


def _where() -> str:
    return _plain(_client(_settings(), ATTEMPTS).meta.endpoint_url)


def _plain(said: object) -> str:
    """What may be printed: without what stands before the host of an address."""
    return re.sub(r"//[^/\s]*@", "//", str(said))
