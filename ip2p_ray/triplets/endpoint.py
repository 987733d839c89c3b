"""A server of the OpenAI API: where it is, how patiently it is asked, what its errors mean.

Which errors are tried again, which mean that the run is wrong, and which concern one request is
decided by their type. The client itself never repeats a request: each one is counted here.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import math
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit

import openai

from ip2p_ray.errors import BudgetError, ConfigError

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_LONGEST_BACKOFF_S = 60.0
_LONGEST_CONNECT_S = 10.0
_NO_MONEY = 402
_PASSING = (408, 425)
_QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached")


class MalformedError(Exception):
    """A response of status 200 that is not what the API promises; never leaves this package."""


class PassingError(openai.APIStatusError):
    """A status for which the client has no type, and that may be another the next time."""


AGAIN = (
    openai.APIConnectionError,  # and APITimeoutError
    openai.RateLimitError,
    openai.ConflictError,
    openai.InternalServerError,
    PassingError,
    MalformedError,
)
"""What may go better the next time."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the model is and how patiently it is asked; no field changes what is asked."""

    base_url: str = "https://api.openai.com/v1"
    """Of the API, to the version: of vLLM, `transformers serve` or Ollama, or a hosted one."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; None where the server wants none."""
    structured: Literal["auto", "json_schema", "off"] = "auto"
    """Whether chat replies are bound to a JSON schema; "auto" stops when the server refuses it."""
    timeout_s: float = 120.0
    """Seconds without a byte after which a request is given up."""
    attempts: int = 10
    """Requests for one caption before it is given up."""
    backoff_s: float = 0.5
    """Longest pause before the second request; doubles with each, up to a minute."""
    patience_s: float = 600.0
    """Longest pause that a server may ask for; for a longer one the run stops."""

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.base_url)
            _ = url.port
        except ValueError as error:
            raise ConfigError(f"base_url is like https://host/v1: {error}") from error
        if url.scheme not in ("http", "https") or not url.hostname or " " in self.base_url:
            raise ConfigError(
                f"base_url is like https://host/v1, got {url.scheme}://{url.hostname or ''}"
            )
        if url.username is not None or url.password is not None:
            raise ConfigError(
                f"base_url of {url.hostname} holds a password; keys come from the environment"
            )
        if self.structured not in ("auto", "json_schema", "off"):
            raise ConfigError(f"structured is auto, json_schema or off, got {self.structured!r}")
        if not (self.timeout_s > 0 and self.backoff_s >= 0 and self.patience_s >= 0):
            raise ConfigError(
                "timeout_s is above 0, backoff_s and patience_s at least 0, got "
                f"{self.timeout_s}, {self.backoff_s} and {self.patience_s}"
            )
        if self.attempts < 1:
            raise ConfigError(f"attempts is at least 1, got {self.attempts}")


class Connection:
    """The official client of one endpoint, its retries and its errors. Of one event loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Reads the key from the environment; sends nothing.

        `sleep` and `jitter` (uniform in [0, 1)) make the pauses between attempts.

        Raises:
            ConfigError: the environment has no key.
        """
        self.endpoint = endpoint
        self._key = key_of(endpoint)
        self.client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=endpoint.base_url,
            timeout=openai.Timeout(
                endpoint.timeout_s, connect=min(_LONGEST_CONNECT_S, endpoint.timeout_s)
            ),
            max_retries=0,
        )
        self._sleep = sleep
        self._jitter = jitter

    def __repr__(self) -> str:
        return f"Connection({self.endpoint.base_url})"

    async def attempts(
        self, request: Callable[[int], Awaitable[_T]], most: int | None = None
    ) -> _T:
        """What `request(attempt)` returns, at the first attempt that raises nothing of AGAIN.

        The error of the last attempt, `most` or the endpoint's number, is raised.

        Raises:
            BudgetError: the server asks for a longer pause than the endpoint's patience, or for
                money.
        """
        most = self.endpoint.attempts if most is None else most
        for attempt in range(1, most):
            try:
                return await self._once(request, attempt)
            except AGAIN as error:
                pause = self._pause(error, attempt)
                _log.debug("attempt %d: %s; again in %.2f s", attempt, self.said(error), pause)
            await self._sleep(pause)
        try:
            return await self._once(request, most)
        except openai.RateLimitError as error:
            self._asked_pause(error)
            raise

    async def _once(self, request: Callable[[int], Awaitable[_T]], attempt: int) -> _T:
        """What the request returns; statuses that the client knows no type of get one."""
        try:
            return await request(attempt)
        except openai.APIStatusError as error:
            if error.status_code == _NO_MONEY:
                raise BudgetError(
                    f"the account at {self.endpoint.base_url} has no money left: {self.said(error)}"
                ) from error
            if error.status_code in _PASSING:
                raise PassingError(
                    error.message, response=error.response, body=error.body
                ) from error
            raise

    def refuse(self, error: openai.APIStatusError, what: str) -> NoReturn:
        """Raises what the whole run has to be told: a ConfigError that names `what` was asked."""
        where, said = self.endpoint.base_url, self.said(error)
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            name = self.endpoint.api_key_env
            key = (
                f"the key in {name}" if name else "requests without a key; name one in api_key_env"
            )
            raise ConfigError(f"{where} refuses {key}: {said}") from error
        if isinstance(error, openai.NotFoundError):
            raise ConfigError(f"{where} has no {what}: {said}") from error
        if isinstance(error, AGAIN):
            raise ConfigError(
                f"{where} does not answer, status {error.status_code}: {said}"
            ) from error
        raise ConfigError(f"{where} refuses {what}: {said}") from error

    def said(self, error: Exception) -> str:
        """What went wrong in one line, without the key."""
        body = getattr(error, "body", None)
        if isinstance(error, openai.APIConnectionError):
            text = _cause(error)
        elif isinstance(body, dict) and isinstance(body.get("message"), str):
            text = body["message"]
        else:
            text = str(error)
        text = " ".join(text.split())[:300]
        return text.replace(self._key, "***") if self._key else text

    def _pause(self, error: Exception, attempt: int) -> float:
        backoff_s = self.endpoint.backoff_s
        asked = self._asked_pause(error)
        if asked is not None:
            return asked + backoff_s * self._jitter()
        longest = min(backoff_s * 2.0 ** (attempt - 1), _LONGEST_BACKOFF_S)
        return longest * (1.0 - self._jitter() / 2)

    def _asked_pause(self, error: Exception) -> float | None:
        """Seconds that the server asks to wait; None if it does not say."""
        if not isinstance(error, openai.APIStatusError):
            return None
        where = self.endpoint.base_url
        if error.code in _QUOTA_CODES:
            raise BudgetError(
                f"the account's quota at {where} is used up: {self.said(error)}"
            ) from error
        seconds = retry_after(error.response.headers)
        if seconds is not None and seconds > self.endpoint.patience_s:
            raise BudgetError(
                f"{where} asks to come back in {seconds:,.0f} s, longer than patience_s "
                f"{self.endpoint.patience_s:g}: {self.said(error)}"
            ) from error
        return seconds


def retry_after(headers: Any) -> float | None:
    """Seconds to wait by a response's `retry-after-ms` or `retry-after`; None if it has neither.

    `headers` is a mapping that knows no case. A date is taken relative to the response's own.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0.0:
            return seconds
    until = email.utils.parsedate_tz(headers.get("retry-after", ""))
    if until is None:
        return None
    sent = email.utils.parsedate_tz(headers.get("date", ""))
    now = time.time() if sent is None else email.utils.mktime_tz(sent)
    return max(0.0, email.utils.mktime_tz(until) - now)


def key_of(endpoint: Endpoint) -> str | None:
    """The key from the environment; None where the server wants none.

    Raises:
        ConfigError: the environment has none, or something that cannot be a key.
    """
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"the environment variable {endpoint.api_key_env} holds no key for "
            f"{endpoint.base_url}; set it, or set api_key_env to None if the server wants none"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the environment variable {endpoint.api_key_env} holds characters that no request "
            "can carry; copy the key again"
        )
    return key


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it came from, and so on to the first cause."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__  # the HTTP client hides one of them


def _cause(error: BaseException) -> str:
    """The text of the first cause that has one."""
    if isinstance(error, openai.APITimeoutError):
        return error.message
    return [str(cause) for cause in _causes(error) if str(cause)][-1]


def never_arrived(error: BaseException) -> bool:
    """Whether a failed request surely reached no server."""
    refused = (ConnectionRefusedError, socket.gaierror)
    return any(isinstance(cause, refused) for cause in _causes(error))
