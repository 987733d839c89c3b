"""How fast a language model may be asked, and how much it may cost.

`TokenBucket` and `Budget` are plain arithmetic over a clock. `LocalLimits` makes of them what a
writer asks before each request and tells after it; one object of it in an actor serves a cluster.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ip2p_ray.errors import BudgetError, ConfigError

_MILLION = 1_000_000
_LOOK_AGAIN_S = 1.0  # how long a ticket that nobody settled can go unnoticed


class Usage(NamedTuple):
    """Tokens of one or more requests."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens

    def plus(self, other: Usage) -> Usage:
        """The sum of the two."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    def minus(self, other: Usage) -> Usage:
        """What is left without the other."""
        return Usage(
            self.prompt_tokens - other.prompt_tokens,
            self.completion_tokens - other.completion_tokens,
        )


NOTHING = Usage()


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What one run may ask for. None is no limit; no field changes what is written."""

    requests_per_minute: float | None = None
    """Requests sent a minute, retries included."""
    tokens_per_minute: float | None = None
    """Tokens a minute, in and out; one that is awaited counts as the longest reply allowed."""
    max_tokens: int | None = None
    """Tokens in and out that the run may cost."""
    max_usd: float | None = None
    """US dollars that the run may cost; needs both prices."""
    usd_per_million_prompt_tokens: float | None = None
    """Price of what the model reads."""
    usd_per_million_completion_tokens: float | None = None
    """Price of what the model writes."""
    ticket_s: float = 900.0
    """Seconds after which a request that nobody reported back counts as paid in full."""

    def __post_init__(self) -> None:
        prices = (self.usd_per_million_prompt_tokens, self.usd_per_million_completion_tokens)
        for name in ("requests_per_minute", "tokens_per_minute", "max_tokens", "max_usd"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is above 0, or None for no limit, got {value}")
        if any(price is not None and not price >= 0 for price in prices):
            raise ConfigError(f"a price is at least 0 USD for a million tokens, got {prices}")
        if self.max_usd is not None and (None in prices or not any(prices)):
            raise ConfigError(
                f"max_usd={self.max_usd} needs usd_per_million_prompt_tokens and "
                f"usd_per_million_completion_tokens, got {prices}"
            )
        if not self.ticket_s > 0:
            raise ConfigError(f"ticket_s is above 0, got {self.ticket_s}")

    def usd(self, usage: Usage) -> float:
        """Its price; 0 where no price is given."""
        return (
            usage.prompt_tokens * (self.usd_per_million_prompt_tokens or 0.0)
            + usage.completion_tokens * (self.usd_per_million_completion_tokens or 0.0)
        ) / _MILLION


class TokenBucket:
    """Permission for `per_minute` units a minute, evenly, with one second's worth at once.

    In any span of time no more is let through than the rate times the span plus that burst, or
    plus one request that is larger than the burst.
    """

    def __init__(
        self,
        per_minute: float,
        *,
        burst: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not per_minute > 0:
            raise ConfigError(f"per_minute is above 0, got {per_minute}")
        self._rate = per_minute / 60.0
        self._burst = max(1.0, self._rate) if burst is None else burst
        self._clock = clock
        self._level = self._burst
        self._at = clock()

    def take(self, amount: float) -> float:
        """Seconds to wait before the `amount`, which counts as taken from now on, may be used."""
        self._fill()
        self._level -= amount
        return max(0.0, -self._level / self._rate)

    def give_back(self, amount: float) -> None:
        """Returns what was taken and not used; a negative amount takes more."""
        self._fill()
        self._level = min(self._burst, self._level + amount)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now


class Budget:
    """What was spent, and what the requests in flight may come to at most.

    A request is let go only if all of it fits under the caps, so that these are passed only by
    what a reply costs beyond its own reservation.
    """

    def __init__(
        self,
        config: LimitsConfig,
        *,
        spent: Usage = NOTHING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._clock = clock
        self._spent = spent
        self._reserved = NOTHING
        self._open: dict[int, tuple[Usage, float]] = {}
        self._tickets = 0

    @property
    def spent(self) -> Usage:
        """Of all requests that were settled."""
        return self._spent

    @property
    def reserved(self) -> Usage:
        """The most that the requests in flight can come to."""
        return self._reserved

    def reserve(self, usage: Usage) -> int | None:
        """A ticket for a request that costs at most `usage`.

        None if it has to wait for requests in flight to be settled.

        Raises:
            BudgetError: it would not fit even if those cost nothing.
        """
        self._expire()
        if self._exceeds(self._spent.plus(usage)):
            raise BudgetError(f"{self._account()}; the next request may cost {self._cost(usage)}")
        if self._exceeds(self._spent.plus(self._reserved).plus(usage)):
            return None
        self._tickets += 1
        self._reserved = self._reserved.plus(usage)
        self._open[self._tickets] = (usage, self._clock() + self._config.ticket_s)
        return self._tickets

    def settle(self, ticket: int, usage: Usage | None) -> None:
        """Replaces a reservation by what the request cost; by itself if that is None.

        A ticket that has expired was counted in full, and stays so.
        """
        if ticket not in self._open:
            return
        reserved, _ = self._open.pop(ticket)
        self._reserved = self._reserved.minus(reserved)
        self._spent = self._spent.plus(reserved if usage is None else usage)

    def _expire(self) -> None:
        now = self._clock()
        for ticket in [ticket for ticket, (_, until) in self._open.items() if until <= now]:
            self.settle(ticket, None)

    def _exceeds(self, usage: Usage) -> bool:
        config = self._config
        return (config.max_tokens is not None and usage.tokens > config.max_tokens) or (
            config.max_usd is not None and config.usd(usage) > config.max_usd
        )

    def _cost(self, usage: Usage) -> str:
        price = f", {self._config.usd(usage):.4f} USD" if self._config.max_usd is not None else ""
        return f"{usage.tokens:,} tokens{price}"

    def _account(self) -> str:
        caps = []
        if self._config.max_tokens is not None:
            caps.append(f"max_tokens {self._config.max_tokens:,}")
        if self._config.max_usd is not None:
            caps.append(f"max_usd {self._config.max_usd:g}")
        return f"spending cap reached ({', '.join(caps)}): {self._cost(self._spent)} were spent"


class Limits(Protocol):
    """What a writer asks before each request, and tells after it."""

    async def acquire(self, most: Usage) -> int:
        """A ticket, as soon as a request that costs at most `most` may be sent.

        Raises:
            BudgetError: it may not, now or later.
        """
        ...

    async def settle(self, ticket: int, used: Usage | None) -> None:
        """What the request of a ticket cost; None if that cannot be known."""
        ...


class LocalLimits:
    """`Limits` of one event loop. `spent` is what earlier runs under the same caps came to."""

    def __init__(
        self,
        config: LimitsConfig,
        *,
        spent: Usage = NOTHING,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._budget = Budget(config, spent=spent, clock=clock)
        self._requests = _bucket(config.requests_per_minute, clock)
        self._tokens = _bucket(config.tokens_per_minute, clock)
        self._taken: dict[int, int] = {}
        self._sleep = sleep
        self._settled = asyncio.Event()

    @property
    def spent(self) -> Usage:
        """Of all requests that were settled, and of the earlier runs."""
        return self._budget.spent

    async def acquire(self, most: Usage) -> int:
        """See `Limits.acquire`."""
        waits = [0.0]
        if self._requests is not None:
            waits.append(self._requests.take(1))
        if self._tokens is not None:
            waits.append(self._tokens.take(most.tokens))
        try:
            if max(waits) > 0.0:
                await self._sleep(max(waits))
            ticket = await self._reserve(most)
        except BaseException:
            if self._tokens is not None:
                self._tokens.give_back(most.tokens)
            raise
        self._taken[ticket] = most.tokens
        return ticket

    async def settle(self, ticket: int, used: Usage | None) -> None:
        """See `Limits.settle`."""
        taken = self._taken.pop(ticket, None)
        if self._tokens is not None and taken is not None and used is not None:
            self._tokens.give_back(taken - used.tokens)
        self._budget.settle(ticket, used)
        self._settled.set()

    async def _reserve(self, most: Usage) -> int:
        while True:
            ticket = self._budget.reserve(most)
            if ticket is not None:
                return ticket
            self._settled.clear()
            try:
                await asyncio.wait_for(self._settled.wait(), _LOOK_AGAIN_S)
            except TimeoutError:
                continue  # perhaps a ticket has expired


def estimated_tokens(text: str) -> int:
    """About as many tokens as a text has, rather too many: one for every three bytes."""
    return math.ceil(len(text.encode("utf-8", "surrogatepass")) / 3)


def _bucket(per_minute: float | None, clock: Callable[[], float]) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute, clock=clock)
