"""Calls to light models leave together; no other call waits."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.api.grpc.call_grouper import MIN_IN_FLIGHT, CallGrouper
from tests.conftest import PATIENCE_S

pytestmark = pytest.mark.unit


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def busy(*, light: bool = True, hold_s: float = 60.0) -> CallGrouper:
    """Put as many calls in flight as make other calls wait."""
    company = CallGrouper(hold_s)
    company.learn(10_000 if not light else 1_000, 1)
    for _ in range(MIN_IN_FLIGHT):
        await company.join()
    return company


async def test_a_call_leaves_at_once_if_few_are_in_flight():
    company = CallGrouper()
    company.learn(100, 1)
    for _ in range(MIN_IN_FLIGHT):
        join = asyncio.ensure_future(company.join())
        await turns()
        assert join.done()


async def test_a_call_to_a_heavy_model_leaves_at_once():
    company = await busy(light=False)
    join = asyncio.ensure_future(company.join())
    await turns()
    assert join.done()


async def test_a_shared_model_call_counts_per_request():
    company = await busy(light=False)
    company.learn(100_000, 64)
    join = asyncio.ensure_future(company.join())
    await turns()
    assert not join.done()
    company.leave()
    await join


async def test_waiting_calls_leave_together_when_one_is_answered():
    company = await busy()
    joins = [asyncio.ensure_future(company.join()) for _ in range(3)]
    await turns()
    assert not any(join.done() for join in joins)
    company.leave()
    await turns()
    assert all(join.done() for join in joins)


async def test_the_wait_is_bounded():
    company = await busy(hold_s=0.002)
    async with asyncio.timeout(PATIENCE_S):
        await company.join()


async def test_a_cancelled_call_does_not_affect_the_others():
    company = await busy()
    gone, stays = (asyncio.ensure_future(company.join()) for _ in range(2))
    await turns()
    gone.cancel()
    await turns()
    company.leave()
    await turns()
    assert gone.cancelled()
    assert stays.done()
