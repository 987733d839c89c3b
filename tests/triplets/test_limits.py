"""Rates and caps by arithmetic on a clock that the tests turn."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip2p_ray.errors import BudgetError, ConfigError
from ip2p_ray.triplets.limits import (
    NOTHING,
    Budget,
    LimitsConfig,
    LocalLimits,
    TokenBucket,
    Usage,
    estimated_tokens,
)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now = 0.0
        self.slept = []

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def test_a_bucket_lets_its_rate_through():
    clock = Clock()
    bucket = TokenBucket(120, clock=clock)  # two a second, two at once
    assert [bucket.take(1) for _ in range(5)] == [0.0, 0.0, 0.5, 1.0, 1.5]
    clock.now = 10.0
    assert [bucket.take(1) for _ in range(3)] == [0.0, 0.0, 0.5]


def test_more_than_the_burst_waits_until_it_has_come_together():
    bucket = TokenBucket(600, clock=Clock())  # ten a second
    assert bucket.take(30) == pytest.approx(2.0)
    assert bucket.take(0) == pytest.approx(2.0)


def test_what_is_given_back_shortens_the_next_wait():
    bucket = TokenBucket(600, clock=Clock())
    bucket.take(40)
    bucket.give_back(25)
    assert bucket.take(5) == pytest.approx(1.0)
    bucket.give_back(10**9)
    assert bucket.take(10) == 0.0
    assert bucket.take(10) == pytest.approx(1.0)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 50)), min_size=1, max_size=40),
    st.floats(30, 6000),
)
def test_no_span_of_time_sees_more_than_the_rate(requests, per_minute):
    clock = Clock()
    bucket = TokenBucket(per_minute, clock=clock)
    admitted = []
    for pause, amount in requests:
        clock.now += pause
        admitted.append((clock.now + bucket.take(amount), amount))
    burst = max(1.0, per_minute / 60)
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            span = admitted[last][0] - admitted[first][0]
            total = sum(amount for _, amount in admitted[first : last + 1])
            over = max(burst, admitted[first][1])
            assert total <= over + span * per_minute / 60 + 1e-6


def budget(clock=None, **options):
    return Budget(LimitsConfig(**options), clock=clock or Clock())


def test_a_price_is_for_a_million_tokens():
    config = LimitsConfig(
        max_usd=1, usd_per_million_prompt_tokens=2.0, usd_per_million_completion_tokens=10.0
    )
    assert config.usd(Usage(250_000, 30_000)) == pytest.approx(0.8)
    assert LimitsConfig().usd(Usage(10**6, 10**6)) == 0.0


def test_a_request_waits_for_those_in_flight_and_is_refused_when_it_cannot_fit():
    account = budget(max_tokens=100)
    first = account.reserve(Usage(30, 20))
    assert account.reserve(Usage(40, 20)) is None
    assert account.reserved == Usage(30, 20)
    account.settle(first, Usage(30, 5))
    assert (account.spent, account.reserved) == (Usage(30, 5), NOTHING)
    second = account.reserve(Usage(40, 20))
    account.settle(second, None)
    assert account.spent == Usage(70, 25)
    with pytest.raises(BudgetError, match=r"max_tokens 100\): 95 tokens were spent; .* 6 tokens"):
        account.reserve(Usage(6, 0))
    assert account.reserve(Usage(5, 0)) is not None


def test_dollars_are_counted_with_their_prices():
    account = budget(
        max_usd=1.0, usd_per_million_prompt_tokens=1.0, usd_per_million_completion_tokens=4.0
    )
    ticket = account.reserve(Usage(200_000, 200_000))  # exactly one dollar
    assert account.reserve(Usage(1, 0)) is None
    account.settle(ticket, Usage(200_000, 100_000))
    with pytest.raises(BudgetError, match=r"300,000 tokens, 0\.6000 USD were spent"):
        account.reserve(Usage(0, 100_001))


def test_a_ticket_is_settled_once_and_one_that_nobody_settles_expires():
    clock = Clock()
    account = budget(clock, max_tokens=100, ticket_s=60)
    lost = account.reserve(Usage(80, 0))
    clock.now = 59.0
    assert account.reserve(Usage(30, 0)) is None
    clock.now = 60.0
    with pytest.raises(BudgetError):
        account.reserve(Usage(30, 0))
    account.settle(lost, NOTHING)
    assert account.spent == Usage(80, 0)
    ticket = account.reserve(Usage(20, 0))
    account.settle(ticket, Usage(5, 0))
    account.settle(ticket, Usage(5, 0))
    assert account.spent == Usage(85, 0)


def test_what_was_spent_before_counts():
    account = Budget(LimitsConfig(max_tokens=10), spent=Usage(4, 4), clock=Clock())
    with pytest.raises(BudgetError):
        account.reserve(Usage(3, 0))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), max_size=60),
    st.lists(st.integers(0, 5), max_size=60),
)
def test_a_cap_is_never_passed_by_replies_within_their_reservations(requests, settles):
    account = budget(max_tokens=200)
    flying = []
    for (most, share), settle in zip(requests, [*settles, *[1] * len(requests)], strict=False):
        try:
            ticket = account.reserve(Usage(0, most))
        except BudgetError:
            assert account.spent.tokens + most > 200
            continue
        if ticket is not None:
            flying.append((ticket, Usage(0, int(most * share))))
        for ticket, used in flying[:settle]:
            account.settle(ticket, used)
        del flying[:settle]
        assert account.spent.tokens + account.reserved.tokens <= 200


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute is above 0"),
        ({"max_tokens": -1}, "max_tokens is above 0"),
        ({"max_usd": float("nan")}, "max_usd is above 0"),
        ({"max_usd": 5.0}, "max_usd=5.0 needs usd_per_million_prompt_tokens"),
        (
            {
                "max_usd": 5.0,
                "usd_per_million_prompt_tokens": 0.0,
                "usd_per_million_completion_tokens": 0.0,
            },
            "max_usd=5.0 needs",
        ),
        ({"usd_per_million_prompt_tokens": -1.0}, "a price is at least 0"),
        ({"ticket_s": 0.0}, "ticket_s is above 0"),
    ],
)
def test_limits_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        LimitsConfig(**options)


def local(clock, **options):
    return LocalLimits(LimitsConfig(**options), clock=clock, sleep=clock.sleep)


def test_requests_and_tokens_are_both_waited_for():
    clock = Clock()

    async def main():
        limits = local(clock, requests_per_minute=60, tokens_per_minute=6000)
        for most in (Usage(50, 50), Usage(10, 10), Usage(200, 80)):
            await limits.acquire(most)

    asyncio.run(main())
    # one request a second, 100 tokens a second: 100 at once, 20 after a second of refilling, 280
    assert clock.slept == [pytest.approx(1.0), pytest.approx(2.0)]


def test_tokens_that_were_not_used_are_given_back():
    clock = Clock()

    async def main():
        limits = local(clock, tokens_per_minute=6000)
        ticket = await limits.acquire(Usage(0, 100))
        await limits.settle(ticket, Usage(0, 60))
        await limits.acquire(Usage(0, 90))
        unknown = await limits.acquire(Usage(0, 10))
        await limits.settle(unknown, None)

    asyncio.run(main())
    assert clock.slept == [pytest.approx(0.5), pytest.approx(0.1)]


def test_a_waiting_request_goes_on_when_another_is_settled():
    async def main():
        limits = local(Clock(), max_tokens=100)
        first = await limits.acquire(Usage(60, 0))
        second = asyncio.create_task(limits.acquire(Usage(60, 0)))
        await asyncio.sleep(0)
        assert not second.done()
        await limits.settle(first, Usage(40, 0))
        await limits.settle(await second, Usage(60, 0))
        assert limits.spent == Usage(100, 0)
        with pytest.raises(BudgetError):
            await limits.acquire(Usage(1, 0))

    asyncio.run(main())


def test_a_request_that_is_cancelled_while_it_waits_costs_nothing():
    async def main():
        limits = LocalLimits(LimitsConfig(requests_per_minute=1, max_tokens=100))
        await limits.acquire(Usage(10, 0))
        waiting = asyncio.create_task(limits.acquire(Usage(20, 0)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert limits.spent == NOTHING
        assert limits._budget.reserved == Usage(10, 0)

    asyncio.run(main())


def test_tokens_are_estimated_from_bytes():
    assert estimated_tokens("") == 0
    assert estimated_tokens("a red boat") == 4
    assert estimated_tokens("\u00e9" * 3) == 2
