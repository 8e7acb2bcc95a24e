"""Accounts of tokens in the real store: all processes together never charge more than the limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from services.gateway.adapters.store.token_accounts import ACCOUNT, TokenAccounts
from services.gateway.application.llm import token_limits
from services.gateway.application.llm.token_limits import TokenLimits
from services.gateway.domain.llm.token_headers import TokenAccount
from services.gateway.domain.llm.token_window import WINDOW_S
from tests.conftest import PATIENCE_S
from tidegate.kernel.errors import TooMany
from tidegate.kernel.protocol.access import Key, Principal, TokenAllowance


@pytest.fixture
async def store(valkey_url) -> AsyncIterator[TokenAccounts]:
    found = TokenAccounts.connect(valkey_url)
    yield found
    await found.close()


@pytest.fixture
def account(fresh):
    def make(minute: int | None = None, day: int | None = None, endpoint: str = "") -> TokenAccount:
        return TokenAccount(fresh("key"), endpoint, TokenAllowance(minute, day))

    return make


async def used(store: TokenAccounts, account: TokenAccount) -> tuple[int, int]:
    _, (balance,) = await store.charge([account], 0)
    return balance.used, balance.day_used


async def test_a_charge_goes_to_all_accounts_or_to_none(store, account):
    whole, single = account(100), account(30, endpoint="chat")
    _, balances = await store.charge([whole, single], 30)
    assert [each.refused for each in balances] == ["", ""]
    _, balances = await store.charge([whole, single], 1)
    assert [each.refused for each in balances] == ["", "minute"]
    assert [await used(store, each) for each in (whole, single)] == [(30, 30), (30, 30)]
    assert 0 < balances[1].wait_ms <= (WINDOW_S + 1) * 1e3
    assert balances[1].reset_ms == balances[1].wait_ms


async def test_a_minute_slides_and_a_day_does_not(store, account):
    mine = account(100, 250)
    now = int(time.time())
    await store.charge([mine], 0)
    old, recent = f"s:{now - WINDOW_S - 5}", f"s:{now - 2}"
    await store._redis.hset(
        ACCOUNT + mine.id, mapping={old: 100, recent: 60, "day": now // 86_400, "day_used": 160}
    )
    before = time.time()
    _, (balance,) = await store.charge([mine], 50)
    after = time.time()
    assert (balance.used, balance.day_used, balance.refused) == (60, 160, "minute")
    free_at = now - 2 + WINDOW_S  # when the recent tokens leave the window
    assert (free_at - after - 3) * 1e3 < balance.wait_ms < (free_at - before + 3) * 1e3
    assert (await store.charge([mine], 40))[1][0].refused == ""
    _, (balance,) = await store.charge([mine], 51)
    assert balance.refused == "minute"
    await store._redis.hdel(ACCOUNT + mine.id, recent)
    _, (balance,) = await store.charge([mine], 60)
    assert (balance.used, balance.day_used, balance.refused) == (40, 200, "day")
    await store._redis.hset(ACCOUNT + mine.id, "day", now // 86_400 - 1)
    assert await used(store, mine) == (40, 0), "a new day"


async def test_settlements(store, account):
    mine = account(100, 1000)
    at, _ = await store.charge([mine], 80)
    await store.settle([mine.id], at, -50, late=True)
    assert await used(store, mine) == (30, 30)
    await store.settle([mine.id], at, 20, late=True)
    assert await used(store, mine) == (50, 50)
    long_ago = at - WINDOW_S - 10
    await store.settle([mine.id], long_ago, 7, late=True)
    assert await used(store, mine) == (57, 57), "tokens beyond an old charge count now"
    await store.settle([mine.id], long_ago, 5, late=False)
    assert await used(store, mine) == (57, 62), "those of an outage count only for the day"
    await store.settle([mine.id], long_ago, -40, late=True)
    assert (await used(store, mine))[0] == 57, "the rest of an old charge is not returned to the minute"


async def test_two_processes_share_an_account(valkey_url, fresh, monkeypatch):
    """Send far more than the limit through both. Each request uses a half of its estimate."""
    # On a slow machine, a process would apply its own share, and the minute would slide. A day does not.
    monkeypatch.setattr(token_limits, "SLOW_S", PATIENCE_S)
    allowance = TokenAllowance(None, 1000)
    robot = Principal(fresh("key"), "robot", frozenset({"infer"}))
    stores = [TokenAccounts.connect(valkey_url) for _ in range(2)]
    processes = [TokenLimits(store, lambda: 2) for store in stores]
    for process in processes:
        process.replace({robot.id: Key(robot, "", tokens=allowance)})
        process.start()
    real, refused = 0, 0

    async def call(process: TokenLimits) -> None:
        nonlocal real, refused
        try:
            made = await process.reserve(robot, "chat", 4, 16, stated=True)
        except TooMany:
            refused += 1
            return
        assert made is not None
        await asyncio.sleep(0)
        made.settle(10)
        real += 10

    async with asyncio.timeout(PATIENCE_S):
        while refused < 500:
            await asyncio.gather(*(call(process) for process in processes for _ in range(8)))
    assert 980 <= real <= 1000
    mine = TokenAccount(robot.id, "", allowance)
    for process in processes:
        await process.stop()
    assert (await used(stores[0], mine))[1] == real, "the account has the real tokens"
    for store in stores:
        await store.close()
