"""An editor that is somewhere else: a client of the service's API, through OpenAI's own package."""

from __future__ import annotations

import base64
import binascii
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypedDict, TypeVar, Unpack

import openai
from PIL import Image

from ip2p_ray.command import is_web_address
from ip2p_ray.errors import (
    AccessError,
    ConfigError,
    EditError,
    ImageError,
    Ip2pError,
    ServiceError,
)
from ip2p_ray.images import decode_image, encode_png
from ip2p_ray.triplets.endpoint import retry_after

_T = TypeVar("_T")
_LONGEST_CONNECT_S = 10.0
_LONGEST_PAUSE_S = 30.0
_BUSY = (429, 503)
_PICTURES = ("image", "image[]", "mask")


class Fields(TypedDict, total=False):
    """What a request may state besides picture and instruction; None is as good as not stated."""

    seed: int | None
    steps: int | None
    text_guidance_scale: float | None
    image_guidance_scale: float | None
    mask: bytes | None
    """A PNG of the picture's size; what is transparent in it may change, the rest stays."""
    size: str | None
    """Of the edited picture, as "512x512"; by default the service chooses."""
    deadline_s: float | None


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A picture on its way."""

    data: bytes
    """An encoded image."""
    step: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Edited:
    """An edited picture and how it was made; the same request with `seed` gives it again."""

    data: bytes
    """The encoded image, as the service sent it."""
    seed: int
    """What was used, whether it was stated or not."""
    steps: int | None = None
    """None where the service does not say."""
    text_guidance_scale: float | None = None
    image_guidance_scale: float | None = None

    @property
    def image(self) -> Image.Image:
        """RGB."""
        return decode_image(self.data)


class RemoteEditor:
    """Edits pictures at a service of this project; `edit` from any threads, `stream` in one loop.

    Both raise, besides what their own docstrings say:

        AccessError: the service wants a key, or another one.
        ServiceError: it cannot be reached, or has no place at the moment; `retry_after_s` is in it.
        EditError: it could not finish this one edit.
        ConfigError: it refuses a value.
        ImageError: it refuses the picture.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 600.0,
        patience_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Sends nothing. `base_url` is the service's address, with or without /v1.

        After `timeout_s` seconds without a byte a request is given up. For `patience_s` seconds in
        all a picture is sent again when the service says to come back later or is not there;
        `sleep` and `jitter` (uniform in [0, 1)) make the pauses.

        Raises:
            ConfigError: no address of a server, or a key that no request can carry.
        """
        if not is_web_address(base_url):
            raise ConfigError(f"the service's address is like http://host:8000, got {base_url!r}")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._key = _checked(api_key)
        self._timeout = openai.Timeout(timeout_s, connect=min(_LONGEST_CONNECT_S, timeout_s))
        self._patience_s, self._sleep, self._jitter = patience_s, sleep, jitter
        self._client = openai.OpenAI(**self._options)
        self._async_client: openai.AsyncOpenAI | None = None

    def __repr__(self) -> str:
        return f"RemoteEditor({self.base_url!r})"

    def __enter__(self) -> RemoteEditor:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    async def __aenter__(self) -> RemoteEditor:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.close()
        if self._async_client is not None:
            await self._async_client.close()

    def models(self) -> list[str]:
        """Names of the models that are served; sends no picture, so it tries address and key."""
        return self._patiently(lambda: self._names())

    async def amodels(self, *, api_key: str | None = None) -> list[dict[str, Any]]:
        """What the service says of its models, "id" among it."""
        try:
            page = await self._streaming.models.list(extra_headers=self._headers(api_key))
            return [model.model_dump() for model in page.data]
        except (openai.APIError, ValueError) as error:
            self._refuse(error, api_key)

    def edit(
        self, image: Image.Image | bytes, instruction: str, **fields: Unpack[Fields]
    ) -> Edited:
        """The picture after the edit; its size is the service's choice unless stated."""
        request = _request(image, instruction, fields)
        return self._patiently(lambda: self._once(request))

    async def stream(
        self,
        image: Image.Image | bytes,
        instruction: str,
        *,
        previews: int = 8,
        api_key: str | None = None,
        **fields: Unpack[Fields],
    ) -> AsyncIterator[Preview | Edited]:
        """Up to `previews` (0 to 10) pictures on their way, then the edited one.

        `api_key` replaces the editor's own. Whoever stops reading frees the service's place.
        """
        request = _request(image, instruction, fields)
        found: Edited | None = None
        try:
            events = await self._streaming.images.edit(
                **request,
                stream=True,
                partial_images=previews,
                extra_headers=self._headers(api_key),
            )
            async with events:
                async for event in events:
                    shown = _event(event)
                    if isinstance(shown, Edited):
                        found = shown
                    if shown is not None:
                        yield shown
        except (openai.APIError, ValueError) as error:
            self._refuse(error, api_key)
        if found is None:
            raise EditError(f"{self.base_url} ended its answer before the picture was there")

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "api_key": "none",  # the client wants one; requests have `_headers`
            "base_url": f"{self.base_url}/v1",
            "timeout": self._timeout,
            "max_retries": 0,
        }

    def _headers(self, api_key: str | None = None) -> dict[str, Any]:
        """Of a request; without a key, so that the service says that it wants one."""
        key = _checked(api_key) or self._key
        return {"Authorization": f"Bearer {key}" if key else openai.Omit()}

    @property
    def _streaming(self) -> openai.AsyncOpenAI:
        """The client of the one event loop."""
        if self._async_client is None:
            self._async_client = openai.AsyncOpenAI(**self._options)
        return self._async_client

    def _names(self) -> list[str]:
        return [model.id for model in self._client.models.list(extra_headers=self._headers())]

    def _once(self, request: dict[str, Any]) -> Edited:
        answer = self._client.images.edit(**request, extra_headers=self._headers())
        picture = (answer.data or [None])[0]
        if picture is None or not picture.b64_json:
            raise ValueError("no picture in it")
        return _edited(
            picture.b64_json, {**(answer.model_extra or {}), **(picture.model_extra or {})}
        )

    def _patiently(self, request: Callable[[], _T]) -> _T:
        """What the request returns, sent again for `patience_s` while that may help."""
        waited = 0.0
        for attempt in range(10**9):
            try:
                try:
                    return request()
                except (openai.APIError, ValueError) as error:
                    self._refuse(error)
            except ServiceError as error:
                if error.retry_after_s is None:
                    raise
                doubled = min(2.0 ** min(attempt, 10) / 2, _LONGEST_PAUSE_S)
                pause = max(error.retry_after_s, doubled * self._jitter())
                if waited + pause > self._patience_s:
                    raise
                waited += pause
            self._sleep(pause)
        raise AssertionError

    def _refuse(self, error: Exception, api_key: str | None = None) -> NoReturn:
        """Raises what the error means, in one sentence without the key."""
        if isinstance(error, Ip2pError):
            raise error
        said = _said(error)
        for key in (api_key, self._key):
            said = said.replace(key, "***") if key else said
        key_words = "the key" if api_key or self._key else "requests without a key"
        raise self._meaning(error, said, key_words) from error

    def _meaning(self, error: Exception, said: str, key_words: str) -> Ip2pError:
        where = self.base_url
        if isinstance(error, openai.APITimeoutError):
            return EditError(f"{where} sent nothing for too long")
        if isinstance(error, openai.APIConnectionError):
            return _later(f"{where} cannot be reached: {said}", 1.0)
        if not isinstance(error, openai.APIError):
            return ServiceError(f"{where} does not speak the API of this service: {said}")
        if not isinstance(error, openai.APIStatusError):  # after the stream began
            return EditError(f"{where} could not finish the edit: {said}")
        status = error.status_code
        if status in _BUSY:
            seconds = retry_after(error.response.headers)
            told = "" if seconds is None else f"; come back in {seconds:g} s"
            return _later(f"{where} has no place now: {said}{told}", seconds or 1.0)
        if status in (401, 403):
            return AccessError(f"{where} refuses {key_words}: {said}")
        if status == 404:
            return ServiceError(f"{where} has nothing of that name: {said}")
        if status == 408 or status >= 500:
            return EditError(f"{where} could not finish the edit: {said}")
        kind = ImageError if status == 413 or error.param in _PICTURES else ConfigError
        return kind(said)


def _request(image: Image.Image | bytes, instruction: str, fields: Fields) -> dict[str, Any]:
    """The arguments of the client's `images.edit`; a picture is sent as it is."""
    data = image if isinstance(image, bytes) else encode_png(image)
    request: dict[str, Any] = {
        "image": ("picture", data, "application/octet-stream"),
        "prompt": instruction,
    }
    stated = {name: value for name, value in fields.items() if value is not None}
    if "mask" in stated:
        request["mask"] = ("mask.png", stated.pop("mask"), "image/png")
    if "size" in stated:
        request["size"] = stated.pop("size")
    return {**request, "extra_body": stated}


def _event(event: Any) -> Preview | Edited | None:
    """What an event of the stream shows; None of an unknown one."""
    if event.type == "image_edit.partial_image":
        extra = event.model_extra or {}
        return Preview(
            data=_decoded(event.b64_json),
            step=int(extra.get("step", event.partial_image_index + 1)),
            steps=int(extra.get("steps", 0)),
        )
    if event.type == "image_edit.completed":
        return _edited(event.b64_json, event.model_extra or {})
    return None


def _edited(encoded: str, said: dict[str, Any]) -> Edited:
    names = ("steps", "text_guidance_scale", "image_guidance_scale")
    return Edited(
        data=_decoded(encoded), seed=int(said["seed"]), **{name: said.get(name) for name in names}
    )


def _decoded(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"a picture that is no base64 ({error})") from error


def _later(sentence: str, seconds: float) -> ServiceError:
    error = ServiceError(sentence)
    error.retry_after_s = seconds
    return error


def _said(error: Exception) -> str:
    """What went wrong in one line."""
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, dict) else None
    if not isinstance(text, str):
        cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else None
        text = str(cause or error)
    return " ".join(text.split())[:500]


def _checked(key: str | None) -> str | None:
    key = (key or "").strip() or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("the key holds characters that no request can carry; copy it again")
    return key
