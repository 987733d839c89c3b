"""One count for all actors: what they may spend, and what becomes of them without it."""

import asyncio

import pytest
import ray

from ip2p_ray.errors import BudgetError, StageError
from ip2p_ray.stages import shared_limits
from ip2p_ray.stages.shared_limits import RemoteLimits
from ip2p_ray.triplets.limits import NOTHING, LimitsConfig, Usage


def test_without_caps_nobody_counts():
    assert shared_limits.start(LimitsConfig(), NOTHING, 1) is None


@pytest.mark.ray
def test_all_spend_from_one_purse(local_ray):
    actor = shared_limits.start(LimitsConfig(max_tokens=100), Usage(20, 0), 8)
    one, other = RemoteLimits(actor), RemoteLimits(actor)

    async def spend():
        tickets = [await one.acquire(Usage(20, 20)), await other.acquire(Usage(20, 20))]
        assert tickets[0] != tickets[1]
        waiting = asyncio.create_task(one.acquire(Usage(10, 10)))
        await other.settle(tickets[0], Usage(20, 0))  # less than was reserved: there is room
        third = await waiting
        for ticket in (tickets[1], third):
            await one.settle(ticket, Usage(20, 20))
        with pytest.raises(BudgetError, match="max_tokens 100"):
            await other.acquire(Usage(1, 0))

    try:
        asyncio.run(asyncio.wait_for(spend(), 60.0))
    finally:
        ray.kill(actor)


@pytest.mark.ray
def test_a_count_that_is_lost_is_told_in_a_sentence(local_ray):
    actor = shared_limits.start(LimitsConfig(max_tokens=100), NOTHING, 8)
    ray.kill(actor)
    with pytest.raises(StageError, match="the actor that counts what is spent was lost"):
        asyncio.run(RemoteLimits(actor).acquire(Usage(1, 0)))
