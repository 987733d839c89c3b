"""One count of requests, tokens and money for all actors that ask an endpoint."""

from __future__ import annotations

from typing import Any

import ray

from ip2p_ray.errors import StageError
from ip2p_ray.stages import run
from ip2p_ray.triplets.limits import Limits, LimitsConfig, Usage


@ray.remote(num_cpus=0)
class SharedLimits:
    """`LocalLimits` for all actors of a plan."""

    def __init__(self, config: LimitsConfig, spent: Usage) -> None:
        from ip2p_ray.triplets.limits import LocalLimits

        self._limits = LocalLimits(config, spent=spent)

    async def acquire(self, most: Usage) -> int:
        """See `Limits.acquire`."""
        return await self._limits.acquire(Usage(*most))

    async def settle(self, ticket: int, used: Usage | None) -> None:
        """See `Limits.settle`."""
        await self._limits.settle(ticket, None if used is None else Usage(*used))


class RemoteLimits(Limits):
    """`SharedLimits` as an actor's writer asks it."""

    def __init__(self, limits: Any) -> None:
        self._limits = limits

    async def acquire(self, most: Usage) -> int:
        """See `Limits.acquire`."""
        try:
            return int(await self._limits.acquire.remote(most))
        except ray.exceptions.RayActorError as error:
            raise StageError(
                "the actor that counts what is spent was lost; the same command goes on from here"
            ) from error
        except ray.exceptions.RayTaskError as error:
            # Ray's own has a traceback for a text.
            raise run.own_error(error) or error from None

    async def settle(self, ticket: int, used: Usage | None) -> None:
        """See `Limits.settle`; told, not waited for."""
        self._limits.settle.remote(ticket, used)


def start(config: LimitsConfig, spent: Usage, calls: int) -> Any:
    """The actor that counts for all, so many calls at a time; None if nothing is to be counted."""
    caps = (
        config.requests_per_minute,
        config.tokens_per_minute,
        config.max_tokens,
        config.max_usd,
    )
    if not any(cap is not None for cap in caps):
        return None
    return run.beside_driver(SharedLimits, max_concurrency=calls).remote(config, spent)
