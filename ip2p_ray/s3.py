"""How a store that speaks S3 (AWS, MinIO, Ceph) is reached, and what it refuses in words.

Endpoint, region and credentials are where boto3 looks for them: AWS_ENDPOINT_URL or
AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_ACCESS_KEY_ID and the like, AWS_PROFILE, the pod's role. Of an
endpoint that is named the path style of addresses is used. Whole objects go through boto3; files
that are read by parts go through Arrow, which looks in the same places.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions
import pyarrow.fs

from ip2p_ray.errors import ConfigError, DatasetError, StorageError

SCHEME = "s3://"

ATTEMPTS = 10
"""Of each request at least, with jittered pauses between them; AWS_MAX_ATTEMPTS is another."""

PATIENCE_S = 60.0
"""For so long a request to a store that has answered before is repeated after its first failure.

boto3's own attempts are over sooner, in 7 to 17 s of a store that cannot be reached, and at once
after some requests that failed. They are all there are where AWS_MAX_ATTEMPTS is set.
"""

MISSING = {"NoSuchKey", "404", "NotFound"}
"""Codes of refusals because there is no such object."""

UNREACHABLE = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
)
"""What boto3 raises where no whole answer came."""

_TIMEOUT_S = 60.0
_PASSING = {429, 500, 502, 503, 504}  # what a store answers that will answer otherwise
_impatience: ContextVar[float | None] = ContextVar("impatience", default=None)


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


@contextmanager
def impatient(timeout_s: float) -> Iterator[None]:
    """Of the block's requests in this thread, each is tried twice, `timeout_s` each time."""
    before = _impatience.set(timeout_s)
    try:
        yield
    finally:
        _impatience.reset(before)


def filesystem(uri: str) -> tuple[pyarrow.fs.S3FileSystem, str]:
    """Arrow's file system for a URI, and the path in it."""
    bucket, key = split(uri)
    return _arrow(_settings(), bucket), f"{bucket}/{key}" if key else bucket


def _settings() -> tuple[tuple[str, str], ...]:
    """All that changes who is asked and as whom: other settings, another client."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


def client(attempts: int = ATTEMPTS) -> Any:
    """boto3's, for what the environment names now; in an `impatient` block an impatient one."""
    timeout_s = _impatience.get()
    if timeout_s is not None:
        return _client(_settings(), 2, timeout_s)
    return _client(_settings(), attempts)


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
        made = boto3.session.Session(region_name=region).client("s3", config=config)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise ConfigError(f"object storage is not set up: {_plain(error)}") from error
    if attempts >= ATTEMPTS and "AWS_MAX_ATTEMPTS" not in told:
        patience = _Patience()
        made.meta.events.register("after-call.s3", patience.note_answer)
        made.meta.events.register_last("needs-retry.s3", patience.pause)
    return made


class _Patience:
    """What botocore asks, after its own rule, whether a request is to be repeated."""

    def __init__(self) -> None:
        self._answered = False

    def note_answer(self, **_: object) -> None:
        """A store that never answered may not be one, and nobody waits for it."""
        self._answered = True

    def pause(
        self,
        response: tuple[Any, Any] | None,
        caught_exception: Exception | None,
        request_dict: dict[str, Any],
        **_: object,
    ) -> float | None:
        """Seconds until another attempt; None for no more."""
        if caught_exception is not None:
            passes = isinstance(caught_exception, UNREACHABLE)
        else:
            passes = response is not None and response[0].status_code in _PASSING
        if not passes or not self._answered:
            return None
        now = time.monotonic()
        since = request_dict["context"].setdefault("ip2p_failing_since", now)
        return random.uniform(0.5, 3.0) if now - since < PATIENCE_S else None


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
        with in_words(f"{SCHEME}{bucket}"):
            # Arrow does not follow a bucket into its region.
            found = client.head_bucket(Bucket=bucket)
            options["region"] = found.get("BucketRegion") or client.meta.region_name
    # What is small is one request then, of which a kill leaves nothing.
    # Arrow's own patience with a silent store is 3 s.
    options |= {
        "connect_timeout": 10,
        "request_timeout": _TIMEOUT_S,
        "allow_delayed_open": True,
    }
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


def code_of(error: botocore.exceptions.ClientError) -> str:
    """The store's name for why it refused."""
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
def in_words(uri: str) -> Iterator[None]:
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
    except UNREACHABLE as error:
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
    code = code_of(error)
    if code in MISSING:
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
