"""Limiters and the real store: shared while it answers, by each process's share while it is away."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from services.gateway.adapters.limit_leases import LimitLeases
from services.gateway.adapters.store.limit_accounts import LimitAccounts
from services.gateway.domain.lease_messages import PriorUsage
from tests.conftest import Line
from tidegate.kernel.protocol.access import Allowance

pytestmark = pytest.mark.integration


@pytest.fixture
async def store_line(valkey_url) -> AsyncIterator[Line]:
    line = Line(valkey_url)
    await line.up()
    yield line
    await line.close()


@pytest.fixture
async def opened(store_line):
    """``opened(principal, allowance, processes)``: the leases of so many processes that share the limits."""
    running: list[tuple[LimitLeases, LimitAccounts]] = []

    def start(principal: str, allowance: Allowance, processes: int, used: int = 0) -> list[LimitLeases]:
        async def read_used(of: str, day: str) -> PriorUsage:
            return PriorUsage(of, day, day[:7], used, used)

        for number in range(processes):
            store = LimitAccounts.connect(store_line.url)
            leases = LimitLeases(store, f"{principal}-{number}", lambda: processes, read_used)
            leases.replace({principal: allowance})
            leases.start()
            running.append((leases, store))
        return [leases for leases, _ in running[-processes:]]

    yield start
    for leases, store in running:
        await leases.stop()
        await store.close()


def take(leases: LimitLeases, principal: str) -> bool:
    limiter = leases.limiters[principal]
    taken = limiter.take(time.monotonic()) is None
    if taken:
        limiter.finish()
    return taken


async def test_four_processes_have_one_bucket(opened, fresh, until):
    key = fresh("key")
    four = opened(key, Allowance(rate=0.001, burst=12), 4)
    assert [take(leases, key) for leases in four for _ in range(3)] == [True] * 12
    await until(lambda: all(leases.limiters[key].rate.minimum == 1 for leases in four))
    assert [take(leases, key) for leases in four] == [False] * 4


async def test_the_only_process_with_traffic_gets_the_whole_limit(opened, fresh, until):
    key = fresh("key")
    first = opened(key, Allowance(rate=0.001, burst=12), 4)[0]
    taken = 0

    def all_taken() -> bool:
        nonlocal taken
        taken += take(first, key)
        return taken == 12

    await until(all_taken)
    assert not take(first, key)


async def test_away_and_back(opened, store_line, fresh, until):
    key = fresh("key")
    first, second = opened(key, Allowance(rate=200, burst=20, day=10**6), 2)
    assert take(first, key)
    assert take(second, key)
    await store_line.down()

    def on_own() -> bool:
        take(first, key)
        take(second, key)
        return first.limiters[key].standalone and second.limiters[key].standalone

    await until(on_own)
    await until(lambda: take(first, key))
    await store_line.up()

    def shared() -> bool:
        take(first, key)
        take(second, key)
        return not (first.limiters[key].standalone or second.limiters[key].standalone)

    await until(shared)


async def test_a_quota_counts_what_was_used_before(opened, fresh, until):
    key = fresh("key")
    (only,) = opened(key, Allowance(day=100), 1, used=99)
    take(only, key)
    await until(lambda: not take(only, key))
    assert only.limiters[key].day_quota.available == 0


async def test_a_changed_limit_applies_and_spent_tokens_stay_spent(opened, fresh, until):
    key = fresh("key")
    (only,) = opened(key, Allowance(rate=0.001, burst=5), 1)
    limiter = only.limiters[key]
    assert [take(only, key) for _ in range(6)] == [True] * 5 + [False]
    only.replace({key: Allowance(rate=0.001, burst=5), "other": Allowance(day=1)})
    assert only.limiters[key] is limiter
    for burst in (5, 8, 3):
        only.replace({key: Allowance(rate=0.002, burst=burst)})
        assert only.limiters[key].allowance == Allowance(rate=0.002, burst=burst)
        assert not take(only, key)
    assert "other" not in only.limiters
    only.replace({key: Allowance(rate=1000, burst=5)})
    await until(lambda: take(only, key), "the account goes by the new rate")
