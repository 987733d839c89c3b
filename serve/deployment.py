"""The two kinds of replicas: the HTTP front, and those with an engine on a device each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from ip2p_ray import logs
from ip2p_ray.copies import local_folder
from ip2p_ray.editor import Editor
from ip2p_ray.engine import EngineConfig
from ip2p_ray.errors import ConfigError, DeadlineError, Ip2pError
from serve.api import ApiConfig, create_api, is_loopback
from serve.keys import Keys
from serve.orders import BusyError, Defaults, Edited, Order, ReplicaLostError

logger = logging.getLogger("ip2p_ray.service")

LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
"""What a handle raises when the replica under a request died, or when there is none."""
DEFAULTS_S = 30.0
"""For how long a model's settings are told without asking a replica again."""


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """One replica's engine."""

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 1
    """Of torch, in a step."""
    engine: EngineConfig = field(default_factory=EngineConfig)


def log_to_stderr() -> None:
    """Lines of this package go where Ray collects them; Serve's own would say the half of it."""
    ours = logging.getLogger("ip2p_ray")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logs.formatter("%(asctime)s %(levelname)s %(message)s"))
        ours.addHandler(handler)


class EditorReplica:
    """An engine on a device; see `EngineEditing`.

    The model is Serve's user_config, so another model in the config is loaded beside the one that
    works, and takes over between two requests.
    """

    def __init__(self, config: ReplicaConfig) -> None:
        import torch

        from serve.engine_editing import EngineEditing

        log_to_stderr()
        # threads that prepare and decode have cores of their own; more would fight for them
        torch.set_num_threads(config.threads)
        self._config = config
        self._make = EngineEditing
        self._editing: EngineEditing | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Loads the model; called by Serve at the start and when the config changes.

        A model that cannot be loaded keeps a new replica from starting. One that works goes on
        with what it has, and says so in its log.
        """
        try:
            editor = await asyncio.to_thread(load_editor, config.get("model"), self._config)
        except (Ip2pError, OSError, RuntimeError) as error:
            if self._editing is None:
                raise
            logger.error("the model is kept: %s", error)
            return
        if self._editing is None:
            from serve.metrics import ReplicaMetrics

            self._editing = self._make(editor, self._config.engine, observer=ReplicaMetrics())
        else:
            await self._editing.exchange(editor)
        logger.info("edits with %s", config.get("model") or "the miniature")

    async def edit(self, order: Order) -> list[Edited]:
        """See `Editing`."""
        assert self._editing is not None
        return await self._editing.edit(order)

    async def stream(self, order: Order) -> AsyncGenerator[Edited, None]:
        """See `Editing`."""
        assert self._editing is not None
        async for edited in self._editing.stream(order):
            yield edited

    async def defaults(self) -> Defaults:
        """See `Editing`."""
        assert self._editing is not None
        return await self._editing.defaults()

    async def check_health(self) -> None:
        """Raises: Ip2pError, when the engine stopped; Serve then replaces the replica."""
        if self._editing is not None:
            await self._editing.ready()

    async def __del__(self) -> None:
        if self._editing is not None:
            await self._editing.close()


def load_editor(model: str | None, config: ReplicaConfig) -> Editor:
    """The editor of a folder, a hub id or s3://..., and of None the miniature's, warmed up.

    Raises:
        ModelError: there is none, or it is broken.
        StorageError: the bucket cannot be read.
    """
    import torch
    from PIL import Image

    from ip2p_ray.miniature import weights

    dtype = getattr(torch, config.dtype)
    if model is None:
        editor = weights.load_editor()
        for network in (editor.model.unet, editor.model.vae, editor.model.text_encoder):
            torch.nn.Module.to(network, device=config.device, dtype=dtype)
    else:
        editor = Editor.load(local_folder(model), device=config.device, dtype=dtype)
    if torch.device(config.device).type == "cpu":  # on an H200 it is slower
        for network in (editor.model.unet, editor.model.vae):
            torch.nn.Module.to(network, memory_format=torch.channels_last)
    # the first picture pays for what is compiled and allocated at first use
    side = editor.settings.resolution
    editor.edit(Image.new("RGB", (side, side)), "warm up", steps=1)
    return editor


class HandleEditing:
    """`Editing` by replicas behind a Serve handle; a request whose replica dies is sent again."""

    def __init__(
        self, handle: DeploymentHandle[Any], *, deployment: str, scales_to_zero: bool
    ) -> None:
        self._edits = handle.edit
        self._streams = handle.options(stream=True).stream
        self._defaults = handle.defaults
        self._known: Defaults | None = None
        self._asked = -DEFAULTS_S
        self._deployment, self._scales_to_zero = deployment, scales_to_zero

    async def edit(self, order: Order) -> list[Edited]:
        """See `Editing`. The same seeds give the same pictures, so a second try is safe."""
        async with _deadline(order):
            for last in (False, True):
                response: Any = self._edits.remote(order)
                try:
                    return await response
                except asyncio.CancelledError:
                    response.cancel()
                    raise
                except Exception as error:
                    plain = _plain(error)
                    if last or not isinstance(plain, ReplicaLostError):
                        raise plain from error
                    logger.warning("a replica was lost under a request, which is sent again")
        raise AssertionError("not reached")

    async def stream(self, order: Order) -> AsyncGenerator[Edited, None]:
        """See `Editing`; previews that were shown before a replica died are not shown again."""
        shown = 0
        ends = None if order.deadline_s is None else time.monotonic() + order.deadline_s
        for last in (False, True):
            responses: Any = self._streams.remote(order)
            try:
                while True:
                    left = None if ends is None else max(0.0, ends - time.monotonic())
                    edited = await asyncio.wait_for(anext(responses), left)
                    if edited.step > shown:
                        shown = edited.step
                        yield edited
                    if not edited.is_preview:
                        return
            except TimeoutError as error:
                raise _late(order) from error
            except Exception as error:
                plain = _plain(error)
                if last or not isinstance(plain, ReplicaLostError):
                    raise plain from error
                logger.warning("a replica was lost under a stream, which is begun again")
            finally:
                responses.cancel()

    async def defaults(self) -> Defaults | None:
        """See `Editing`. A replica that would have to start, or has no place, is not waited for."""
        if time.monotonic() > self._asked + DEFAULTS_S and not self._scales_to_zero:
            self._asked = time.monotonic()
            with contextlib.suppress(Exception):
                async with asyncio.timeout(2):
                    self._known = await self._defaults.remote()
        return self._known

    async def ready(self) -> bool:
        """Whether a replica runs; one that is started on demand counts."""
        if self._scales_to_zero:
            return True
        status = await asyncio.to_thread(serve.status)
        application = status.applications.get(serve.get_replica_context().app_name)
        deployment = application and application.deployments.get(self._deployment)
        states = deployment.replica_states if deployment else {}
        return any(state == "RUNNING" and count for state, count in states.items())


class _deadline:  # noqa: N801 reads as a statement
    """Ends what is in it when an order's time is over."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._timeout = asyncio.timeout(order.deadline_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError as late:
            raise _late(self._order) from late


def _late(order: Order) -> DeadlineError:
    return DeadlineError(f"not done after {order.deadline_s:g} s")


def _plain(error: Exception) -> Exception:
    """What was raised where it was raised, without what Ray wraps around it."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    if isinstance(error, BackPressureError):
        return BusyError(str(error))
    if isinstance(error, LOST):
        return ReplicaLostError(type(error).__name__)
    return error


@serve.ingress()
class Front:
    """The HTTP API in front of the replicas."""

    def __init__(
        self,
        config: ApiConfig,
        editor: DeploymentHandle[Any],
        *,
        deployment: str,
        scales_to_zero: bool,
    ) -> None:
        log_to_stderr()
        # of this process' environment, so that no key stands in the config of a deployment
        self._config = replace(config, keys=Keys.from_environment())
        if not (len(self._config.keys) or config.allow_unauthenticated):
            _require_loopback(_bound_host())
        self._editing = HandleEditing(editor, deployment=deployment, scales_to_zero=scales_to_zero)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from serve.metrics import FrontMetrics

        return create_api(self._config, self._editing, FrontMetrics())


def _require_loopback(host: str | None) -> None:
    if host is not None and not is_loopback(host):
        raise ConfigError(
            f"the service listens on {host} without API keys: set IP2P_API_KEYS_FILE or "
            "IP2P_API_KEYS, listen on 127.0.0.1, or say allow_unauthenticated: true"
        )


def _bound_host() -> str | None:
    """Where Serve listens, None where this version does not tell; each request is looked at too."""
    try:
        from ray.serve.context import _get_global_client

        client: Any = _get_global_client()
        return str(client.http_config.host)
    except (ImportError, AttributeError):
        return None
