"""The HTTP API: OpenAI's images API, health, and the page's door. Knows no Ray and no torch.

Source: the OpenAI API reference, `POST /v1/images/edits`; fields of ours are in `form.EditForm`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ip2p_ray.errors import ConfigError, DeadlineError, ImageError
from serve import answers
from serve.counting import Counting
from serve.form import Asked, Limits, read_form, request_schema, understand
from serve.keys import Keys, RateLimit
from serve.orders import BusyError, Edited, Editing, ReplicaLostError
from serve.problems import Problem, retry_after

logger = logging.getLogger("ip2p_ray.service")

FREE = ("/healthz", "/readyz")
"""Paths that need no key: a load balancer has none."""

LINGER_S, LINGER_BYTES = 1.0, 32 * 2**20
"""How far a body that is refused is read on, so that its sender sees the answer."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """How the API answers."""

    model: str
    """The name under which the model is served."""
    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=lambda: Keys([]))
    """Without any, only the machine's own addresses are answered."""
    allow_unauthenticated: bool = False
    """Answer other machines without keys too."""
    requests_per_minute: float | None = None
    """Pictures a minute that each key may ask for, of each process that answers; None for no
    limit."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this API from a browser."""
    log_prompts: bool = False
    """Instructions may stand in the log."""
    page: str | None = None
    """Where the page is; `/` leads there."""

    def __post_init__(self) -> None:
        rate = self.requests_per_minute
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"requests_per_minute is a number above 0, got {rate}")


def create_api(config: ApiConfig, editing: Editing, counting: Counting | None = None) -> FastAPI:
    """The ASGI application."""
    app: FastAPI = FastAPIOffline(
        title="ip2p_ray editor",
        description="Edits a picture as a sentence tells it. Speaks OpenAI's images API.",
        version="1",
        redoc_url=None,  # its script fetches a picture from outside
        swagger_ui_parameters={"validatorUrl": None},  # which is a site outside
    )
    service = _Service(config, editing, counting or Counting())
    errors = answers.error_schemas()
    app.add_api_route(
        "/v1/images/edits",
        service.edit,
        methods=["POST"],
        summary="Edit a picture",
        responses={200: answers.ANSWER, **errors},
        openapi_extra={"requestBody": request_schema(config.limits)},
        response_class=JSONResponse,
    )
    app.add_api_route("/v1/models", service.models, methods=["GET"], responses={401: errors[401]})
    app.add_api_route("/healthz", service.healthz, methods=["GET"])
    app.add_api_route("/readyz", service.readyz, methods=["GET"], responses={503: errors[503]})
    if config.page is not None:
        app.add_api_route("/", service.door, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(Problem, service.tell)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(Exception, _unforeseen)
    app.add_middleware(_Guard, service=service)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


class _Guard:
    """Lets requests in, and notes each in the log."""

    def __init__(self, app: ASGIApp, service: _Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), None
        request = Request(scope)
        unread = _has_body(request)

        async def reading() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread:
                    # or a server would read the rest, however long, to answer the next request
                    headers = [*message.get("headers", ()), (b"connection", b"close")]
                    message = {**message, "headers": headers}
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _linger(reading)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        answer: ASGIApp = self._app
        try:
            try:
                self._service.let_in(request)
            except Problem as problem:
                answer = await self._service.tell(request, problem)
            await answer(scope, reading, noted)
        except asyncio.CancelledError:  # by Ray Serve, for whoever asked has left
            status = status or 499
            raise
        finally:
            # 500 is what whoever is outside of this answers, when nothing is answered here
            self._service.note(request, status or 500, time.monotonic() - began)


def _has_body(request: Request) -> bool:
    length = request.headers.get("content-length", "0")
    return length != "0" or "transfer-encoding" in request.headers


async def _linger(receive: Receive) -> None:
    """Reads on for a moment: closing on what was not read may take the answer from the line."""
    read = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while read < LINGER_BYTES:
                message = await receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


class _Service:
    def __init__(self, config: ApiConfig, editing: Editing, counting: Counting) -> None:
        self._config, self._editing, self._counting = config, editing, counting
        self._created = int(time.time())
        self._rates = (
            None if config.requests_per_minute is None else RateLimit(config.requests_per_minute)
        )
        self._usual_s = 1.0  # a running mean of what a request takes

    def let_in(self, request: Request) -> None:
        """Raises: Problem 401 or 403 for who may not ask."""
        # not request.url, into which older versions of Starlette put the Host header
        if request.scope["path"] in FREE:
            return
        keys = self._config.keys
        if len(keys):
            key = keys.find(request.headers.get("authorization"))
            if key is None:
                raise Problem(
                    401,
                    "no valid API key: send one as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            request.state.key = key
        elif not (self._config.allow_unauthenticated or self._is_of_this_machine(request)):
            raise Problem(
                403,
                "this service has no API keys and answers its own machine only; its operator sets "
                "IP2P_API_KEYS_FILE or allow_unauthenticated",
                code="keys_required",
            )

    def _is_of_this_machine(self, request: Request) -> bool:
        """Whether a request without a key comes from here, and not through a foreign web page.

        A browser on this machine would send what a page from elsewhere asks for; the page gives
        itself away by its Origin, or by the name under which it had this machine looked up.
        """
        hosts = [_server(request)]
        if "host" in request.headers:
            hosts.append(_host_in(f"//{request.headers['host']}"))
        origin = request.headers.get("origin")
        if origin is not None and origin not in self._config.cors_origins:
            hosts.append(_host_in(origin))
        return all(is_loopback(host) for host in hosts)

    async def edit(self, request: Request) -> Response:
        """Edit a picture as the prompt tells; the seed used comes back."""
        limits = self._config.limits
        data = await read_form(request, limits)
        try:
            asked = await understand(data, limits, self._config.model)
        finally:
            await data.close()
        self._take_tokens(request, len(asked.order.seeds))
        request.state.told = self._told(asked)
        try:
            return await (self._stream if asked.form.stream else self._whole)(request, asked)
        except Problem as problem:
            if problem.status in (400, 429, 503):  # nothing was made
                self._give_back_tokens(request, len(asked.order.seeds))
            raise

    async def _whole(self, request: Request, asked: Asked) -> Response:
        began = time.monotonic()
        made = await _while_connected(request, self._editing.edit(asked.order), self._problem)
        self._usual_s += 0.1 * (time.monotonic() - began - self._usual_s)
        return JSONResponse(answers.whole(asked, made))

    async def _stream(self, request: Request, asked: Asked) -> Response:
        stream = self._editing.stream(asked.order)
        # up to the first event, a failure still has a status
        first = await _while_connected(request, anext(stream), self._problem)
        return StreamingResponse(
            self._events(asked, first, stream),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def _events(
        self, asked: Asked, first: Edited, rest: AsyncGenerator[Edited, None]
    ) -> AsyncIterator[bytes]:
        index, began = 0, time.monotonic()
        edited: Edited | None = first
        try:
            while edited is not None:
                yield answers.event(asked, edited, index)
                index += 1
                edited = await anext(rest, None)
            self._usual_s += 0.1 * (time.monotonic() - began - self._usual_s)
        except Exception as error:  # noqa: BLE001 raised again, unless it was foreseen
            problem = self._problem(error)
            self._counting.refused(problem.reason)
            yield answers.sse("error", problem.body)
        finally:
            await rest.aclose()

    async def models(self) -> dict[str, Any]:
        """The model that is served, and what it is used with where a request states nothing."""
        defaults = await self._editing.defaults()
        entry = {
            "id": self._config.model,
            "object": "model",
            "created": self._created,
            "owned_by": "ip2p_ray",
            **({} if defaults is None else {"defaults": defaults}),
        }
        return {"object": "list", "data": [entry]}

    async def healthz(self) -> dict[str, str]:
        """Answers while the process lives."""
        return {"status": "ok"}

    async def readyz(self) -> dict[str, str]:
        """Answers 200 when requests are taken."""
        if not await self._editing.ready():
            raise Problem(503, "no replica is ready yet", headers=retry_after(5))
        return {"status": "ready"}

    async def door(self) -> Response:
        """Leads to the page."""
        return RedirectResponse(f"{self._config.page}/")

    def _take_tokens(self, request: Request, pictures: int) -> None:
        key = getattr(request.state, "key", None)
        if self._rates is None or key is None:
            return
        wait = self._rates.wait_s(key, pictures)
        if wait > 0:
            raise Problem(
                429,
                f"this key may ask for {self._config.requests_per_minute:g} pictures a minute; "
                f"come again in {wait:.0f} s",
                code="rate_limit_exceeded",
                headers=retry_after(wait),
            )

    async def tell(self, _request: Request, problem: Exception) -> Response:
        """The answer to a request that cannot be done."""
        assert isinstance(problem, Problem)
        self._counting.refused(problem.reason)
        return problem.response()

    def note(self, request: Request, status: int, seconds: float) -> None:
        """One line in the log, without picture or key."""
        path = request.scope["path"][:200]
        self._counting.answered(path, status, seconds)
        told = getattr(request.state, "told", "")
        logger.info("%s %r %d %.0f ms%s", request.method, path, status, seconds * 1000, told)

    def _give_back_tokens(self, request: Request, pictures: int) -> None:
        key = getattr(request.state, "key", None)
        if self._rates is not None and key is not None:
            self._rates.give_back(key, pictures)

    def _told(self, asked: Asked) -> str:
        order = asked.order
        told = f" n={len(order.seeds)} size={asked.form.size} steps={order.steps or 'auto'}"
        return f"{told} prompt={order.instruction!r}" if self._config.log_prompts else told

    def _problem(self, error: Exception) -> Problem:
        """What is answered to a failure of whoever edits; what nobody foresaw is raised again."""
        if isinstance(error, Problem):
            return error
        if isinstance(error, ImageError):
            param = "mask" if str(error).startswith("mask") else "image"
            return Problem(400, str(error), param=param, code="invalid_image")
        if isinstance(error, ConfigError):
            param = str(error).partition(" ")[0].rstrip(":")
            return Problem(400, str(error), param=param)
        if isinstance(error, DeadlineError):
            # a client would only spend as long again
            headers = {"x-should-retry": "false"}
            return Problem(408, str(error), code="deadline_exceeded", headers=headers)
        if isinstance(error, BusyError):
            return Problem(
                429,
                "as many requests wait as this service takes; come again",
                code="queue_full",
                headers=retry_after(self._usual_s),
            )
        if isinstance(error, ReplicaLostError):
            return Problem(
                503,
                "what edited the picture went away twice; send it again",
                code="replica_lost",
                headers=retry_after(5),
            )
        raise error


async def _while_connected(
    request: Request, work: Awaitable[T], problem: Callable[[Exception], Problem]
) -> T:
    """What the work returns; it is cancelled when whoever asked is gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(499, "whoever asked is gone", code="client_gone")
        try:
            return task.result()
        except Exception as error:
            raise problem(error) from error
    finally:
        for each in (task, gone):
            each.cancel()


def is_loopback(host: str) -> bool:
    """Whether an address is reached from the same machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server(request: Request) -> str:
    """By which of the machine's addresses the connection came in."""
    return str((request.scope.get("server") or ("",))[0])


def _host_in(address: str) -> str:
    """The host of an address, "" where it has none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


async def _http_problem(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the same shape as all else."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    path = repr(request.scope["path"][:100])
    told = {
        404: f"there is no {path} here; /docs shows what there is",
        405: f"{path} takes {headers.get('Allow', 'another method')}, got {request.method[:20]}",
    }
    message = told.get(error.status_code, str(error.detail))
    return Problem(error.status_code, message, headers=headers).response()


async def _unforeseen(_request: Request, _error: Exception) -> Response:
    """Whatever nobody thought of; the server's log has it, the answer does not."""
    return Problem(500, "something went wrong here; the operator's log says what").response()
