"""Limit accounts in the real store: all processes together never hold more than the limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.gateway.adapters.store.limit_accounts import LimitAccounts
from services.gateway.domain.lease_messages import LeaseGrant, LeaseRequest, PriorUsage, TokenHolding
from tidegate.kernel.protocol.access import Allowance

DAY, MONTH = "2026-01-31", "2026-01"


class Account:
    """One caller's account, settled by processes a, b, ..."""

    def __init__(self, store: LimitAccounts, principal: str, allowance: Allowance) -> None:
        self.store = store
        self.principal = principal
        self.allowance = allowance

    async def __call__(self, process: str, day: str = DAY, **pairs: tuple[int, int]) -> LeaseGrant:
        holdings = {name: TokenHolding(*pair) for name, pair in pairs.items()}
        request = LeaseRequest(self.principal, self.allowance, day, day[:7], **holdings)
        return (await self.store.settle(process, [request]))[0]


@pytest.fixture
async def store(valkey_url) -> AsyncIterator[LimitAccounts]:
    found = LimitAccounts.connect(valkey_url)
    yield found
    await found.close()


@pytest.fixture
def account(store, fresh):
    # So slow that no token is added while a test runs.
    def make(rate: float | None = 1e-6, **limits) -> Account:
        return Account(store, fresh("key"), Allowance(rate=rate, **limits))

    return make


async def test_a_bucket_is_shared(account):
    settle = account(burst=10)
    assert (await settle("a", rate=(0, 6))).rate == 6
    assert (await settle("b", rate=(0, 6))).rate == 4
    empty = await settle("c", rate=(0, 6))
    assert (empty.rate, empty.rate_left) == (0, 0)
    assert empty.wait_ms > 1e8
    assert (await settle("a", rate=(6, 1))).rate == 1, "five are returned"
    assert (await settle("c", rate=(0, 6))).rate == 5


async def test_borrowed_tokens_are_charged(account):
    settle = account(burst=10)
    assert (await settle("a", rate=(-4, 1))).rate_left == 5
    assert (await settle("b", rate=(-7, 5))).rate == 0
    assert (await settle("b", rate=(0, 5))).wait_ms > 2.9e9, "two are owed, and one more is wanted"


async def test_a_bucket_and_its_holdings_are_at_most_the_burst(account):
    settle = account(rate=1000, burst=20)
    assert (await settle("a", rate=(0, 15))).rate == 15
    await asyncio.sleep(0.05)
    assert (await settle("b", rate=(0, 20))).rate == 5, "15 are still held"
    await settle("a", rate=(0, 0))
    await settle("b", rate=(0, 0))
    await asyncio.sleep(0.05)
    assert (await settle("b", rate=(0, 50))).rate == 20


async def test_the_holdings_of_a_silent_process_expire(account, store, until):
    settle = account(concurrency=3, rate=None)
    assert (await settle("a", slots=(0, 3))).slots == 3
    assert (await settle("b", slots=(0, 1))).slots == 0

    async def freed() -> bool:
        return (await settle("b", slots=(0, 3))).slots == 3

    await until(freed)  # after five seconds a silent process counts as gone


async def test_slots_are_shared_and_a_lack_is_noted(account, until):
    settle = account(concurrency=4, rate=None)
    first = await settle("a", slots=(1, 3))
    assert (first.slots, first.tight) == (3, False)
    second = await settle("b", slots=(0, 3))
    assert (second.slots, second.tight) == (1, True)

    async def lack_is_noted() -> bool:  # for a second, so that a process returns spare slots
        await settle("b", slots=(0, 3))
        return (await settle("a", slots=(1, 1))).tight

    await until(lack_is_noted)
    assert (await settle("b", slots=(1, 3))).slots == 3
    assert (await settle("a", slots=(2, 2))).slots == 2, (
        "running requests keep their slots, also above the limit"
    )


async def test_quotas_count_and_start_again_in_a_new_period(account):
    settle = account(day=10, month=15, rate=None)
    grant = await settle("a", day_quota=(0, 8), month_quota=(0, 8))
    assert (grant.day_quota, grant.day_left, grant.month_quota, grant.month_left) == (8, 2, 8, 7)
    grant = await settle("b", day_quota=(0, 8), month_quota=(-2, 8))
    assert (grant.day_quota, grant.month_quota) == (2, 5)
    grant = await settle("a", day="2026-02-01", day_quota=(0, 3), month_quota=(0, 3))
    assert (grant.day_quota, grant.day_left, grant.month_left) == (3, 7, 12)
    late = await settle("b", day_quota=(0, 8), month_quota=(0, 0))
    assert late.day_quota == 7, "a clock that is behind does not restart yesterday"


async def test_counts_are_seeded_once(account, store):
    settle = account(day=10, month=100, rate=None)
    assert not (await settle("a", day_quota=(0, 2), month_quota=(0, 2))).seeded
    for _ in range(2):
        await store.seed(PriorUsage(settle.principal, DAY, MONTH, day_requests=5, month_requests=50))
    grant = await settle("a", day_quota=(2, 9), month_quota=(2, 2))
    assert grant.seeded
    assert (grant.day_quota, grant.day_left, grant.month_left) == (5, 0, 48)
    await store.seed(PriorUsage(settle.principal, "2026-01-30", MONTH, day_requests=5, month_requests=50))
    assert (await settle("a", day_quota=(5, 5))).day_left == 0


async def test_many_accounts_in_one_call(account, store):
    ones = [account(burst=n) for n in (1, 2, 3)]
    requests = [
        LeaseRequest(one.principal, one.allowance, DAY, MONTH, rate=TokenHolding(0, 5)) for one in ones
    ]
    assert [grant.rate for grant in await store.settle("a", requests)] == [1, 2, 3]
    assert await store.settle("a", []) == []


async def test_budgets_are_shared_and_begin_again(account):
    settle = account(rate=None, day_budget=10**13, month_budget=2 * 10**13)
    first = await settle("a", day_budget=(0, 6 * 10**12), month_budget=(0, 6 * 10**12))
    assert (first.day_budget, first.month_budget) == (6 * 10**12, 6 * 10**12)
    second = await settle("b", day_budget=(0, 6 * 10**12), month_budget=(0, 1))
    assert (second.day_budget, second.day_budget_left) == (4 * 10**12, 0)
    assert (await settle("a", day_budget=(6 * 10**12, 0))).day_budget_left == 6 * 10**12, "returned"
    fresh = await settle("b", day="2026-02-01", day_budget=(0, 1), month_budget=(0, 1))
    assert (fresh.day_budget_left, fresh.month_budget_left) == (10**13 - 1, 2 * 10**13 - 1)


async def test_a_debt_is_charged_to_the_budget(account):
    settle = account(rate=None, day_budget=1000)
    grant = await settle("a", day_budget=(-400, 100))
    assert (grant.day_budget, grant.day_budget_left) == (100, 500)
