"""Limiters of several processes against a small shared account. Time is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from services.gateway.domain.key_limiter import KeyLimiter, LimitReached
from services.gateway.domain.lease_messages import LeaseGrant, LeaseRequest, TokenHolding
from services.gateway.domain.leased_tokens import LeasedTokens
from tidegate.kernel.protocol.access import Allowance

pytestmark = pytest.mark.unit

DAY = "2026-01-31"
TICK_S = 0.02


@dataclass
class Account:
    """An account as the store keeps it (test_limit_accounts.py tests the real script)."""

    allowance: Allowance
    tokens: float = 0.0
    at: float = 0.0
    used: int = 0
    slots: dict[str, int] = field(default_factory=dict)
    tight_at: float = -math.inf

    def __post_init__(self) -> None:
        self.tokens = self.allowance.burst

    def settle(self, process: str, lease_request: LeaseRequest, now: float) -> LeaseGrant:
        rate = wait_ms = 0.0
        if self.allowance.rate is not None:
            more = (now - self.at) * self.allowance.rate
            self.tokens, self.at = min(self.allowance.burst, self.tokens + more), now
            self.tokens, rate = exchange(self.tokens, lease_request.rate)
            wait_ms = max(0.0, (1 - self.tokens) / self.allowance.rate * 1e3)
        available = day = 0.0
        if self.allowance.day is not None:
            available, day = exchange(self.allowance.day - self.used, lease_request.day_quota)
            self.used = self.allowance.day - int(available)
        slots = 0
        if self.allowance.concurrency is not None:
            free = self.allowance.concurrency - sum(n for p, n in self.slots.items() if p != process)
            slots = self.slots[process] = max(
                lease_request.slots.held, min(lease_request.slots.wanted, max(0, free))
            )
            if lease_request.slots.wanted > free:
                self.tight_at = now
        return LeaseGrant(
            rate=int(rate),
            rate_left=max(0.0, self.tokens),
            wait_ms=wait_ms,
            slots=slots,
            tight=now - self.tight_at < 1,
            day_quota=int(day),
            day_left=max(0, int(available)),
        )


def exchange(balance: float, holding: TokenHolding) -> tuple[float, float]:
    held = holding.held
    if held < 0:
        balance, held = balance + held, 0
    if held > holding.wanted:
        return balance + held - holding.wanted, holding.wanted
    more = min(holding.wanted - held, math.floor(max(0.0, balance)))
    return balance - more, held + more


def rate_tokens(limiter: KeyLimiter) -> LeasedTokens:
    """Return the tokens of the rate."""
    assert limiter.rate is not None
    return limiter.rate


def limit_of(refusal: LimitReached | None) -> str:
    """Return the limit that refused a request; empty if none did."""
    return refusal.limit if refusal is not None else ""


class Process:
    """A gateway process: a limiter, settled every tick while it is active."""

    def __init__(self, name: str, account: Account, share: float = 1.0) -> None:
        self.name = name
        self.account = account
        self.away = False
        self.limiter = KeyLimiter("key", account.allowance, lambda _: None)
        self.limiter.share = share

    def take(self, now: float) -> bool:
        return self.limiter.take(now) is None

    def tick(self, now: float) -> None:
        if not self.limiter.active:
            return
        if self.away:
            self.limiter.use_own_share(now)
        elif (lease_request := self.limiter.lease_request(now, DAY)) is not None:
            self.limiter.apply(lease_request, self.account.settle(self.name, lease_request, now), now)


def offered(processes: list[Process], per_s: float, seconds: float, start: float = 0.0) -> int:
    """Send short requests at an even pace, in turn to each process. Return how many were admitted."""
    accepted, next_tick = 0, [start + i * TICK_S / len(processes) for i in range(len(processes))]
    for number in range(round(per_s * seconds)):
        now = start + number / per_s
        for at, process in enumerate(processes):
            while next_tick[at] <= now:
                process.tick(next_tick[at])
                next_tick[at] += TICK_S
        process = processes[number % len(processes)]
        if process.take(now):
            process.limiter.finish()
            accepted += 1
    return accepted


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("burst", [5, 100])
def test_one_budget_for_any_number_of_processes(count, burst):
    account = Account(Allowance(rate=100, burst=burst))
    processes = [Process(str(i), account, 1 / count) for i in range(count)]
    accepted = offered(processes, per_s=1000, seconds=20)
    assert 2000 * 0.98 <= accepted <= 2000 + max(burst, count), (
        "each process may borrow one, and it is charged"
    )


@pytest.mark.parametrize("busy", [1, 4])
def test_no_request_is_refused_below_the_limit(busy):
    account = Account(Allowance(rate=100, burst=100))
    processes = [Process(str(i), account, 1 / 4) for i in range(4)][:busy]
    assert offered(processes, per_s=90, seconds=20) == 1800


def test_a_slow_limit_holds_over_processes_that_borrow():
    account = Account(Allowance(rate=1, burst=1))
    processes = [Process(str(i), account, 1 / 4) for i in range(4)]
    assert offered(processes, per_s=3, seconds=60) <= 60 + 4


def test_the_first_burst_is_taken_without_asking():
    process = Process("a", Account(Allowance(rate=10, burst=40)), share=1 / 4)
    assert [process.take(0.0) for _ in range(11)] == [True] * 10 + [False]
    process.tick(0.0)
    assert process.account.tokens + rate_tokens(process.limiter).held == 30, "borrowed tokens are charged"
    assert not process.take(0.001), "others may have borrowed their share"
    process.tick(0.02)
    assert process.take(0.021), "the rest is available after the settlement"


def test_processes_that_start_together_admit_at_most_the_burst():
    account = Account(Allowance(rate=0.001, burst=12))
    processes = [Process(str(i), account, 1 / 4) for i in range(4)]
    taken = sum(process.take(0.0) for process in processes for _ in range(5))
    for step in range(20):
        for process in processes:
            process.tick(step * TICK_S)
            taken += process.take(step * TICK_S)
    assert taken == 12


def test_single_requests_of_an_idle_key_are_not_refused():
    process = Process("a", Account(Allowance(rate=0.001, burst=12)), share=1 / 4)
    assert process.take(0.0)
    process.tick(0.001)
    assert process.take(0.002)
    assert process.take(0.003)
    process.tick(0.021)
    assert process.take(0.022)


def test_unused_tokens_are_returned():
    process = Process("a", Account(Allowance(rate=1, burst=100)))
    process.take(0.0)
    process.tick(0.0)
    process.take(0.01)
    process.tick(0.02)
    assert rate_tokens(process.limiter).held == 98
    for step in range(1, 60):
        process.tick(step * TICK_S)
    assert rate_tokens(process.limiter).held == 0
    assert not process.limiter.active
    assert process.account.tokens == pytest.approx(98 + 1, abs=0.1)


def test_when_to_retry():
    process = Process("a", Account(Allowance(rate=0.5, burst=1)))
    assert process.take(0.0)
    process.tick(0.0)
    refusal = process.limiter.take(0.5)
    assert refusal is not None
    assert refusal.limit == "rate"
    assert refusal.retry_after_s == pytest.approx(2.0, abs=0.6)
    assert process.limiter.take(1.0) is not None


def test_a_quota_is_used_up_to_the_last():
    account = Account(Allowance(day=50))
    processes = [Process(str(i), account, 1 / 4) for i in range(4)]
    assert 50 <= offered(processes, per_s=100, seconds=10) <= 50 + 4
    assert limit_of(processes[0].limiter.take(11.0)) == "day"
    processes[0].limiter.new_day(new_month=False)
    account.used = 0
    assert processes[0].take(11.1)


def test_a_refused_request_takes_no_tokens():
    limiter = Process("a", Account(Allowance(rate=100, burst=100, day=1))).limiter
    assert limiter.take(0.0) is None
    assert limit_of(limiter.take(0.0)) == "day"
    assert rate_tokens(limiter).held == -1


def test_slots_move_to_the_process_that_needs_them():
    account = Account(Allowance(concurrency=4))
    first, second = Process("a", account, 1 / 2), Process("b", account, 1 / 2)
    assert [first.take(0.0) for _ in range(3)] == [True, True, False], "its share, before a settlement"
    first.tick(0.0)
    assert [first.take(0.01) for _ in range(2)] == [True, False]
    first.tick(0.02)
    assert first.take(0.03)
    assert second.take(0.03), "it has not settled yet"
    second.tick(0.04)
    assert limit_of(second.limiter.take(0.05)) == "concurrency"
    for _ in range(3):
        first.limiter.finish()
    first.tick(0.06)
    first.tick(0.3)
    second.tick(0.31)
    assert [second.take(0.32) for _ in range(3)].count(True) >= 1


def test_slots_stay_within_the_limit_after_a_settlement():
    account = Account(Allowance(concurrency=5))
    processes = [Process(str(i), account, 1 / 3) for i in range(3)]
    for process in processes:
        process.take(0.0)
    for step in range(200):
        now = step * TICK_S
        for process in processes:
            process.tick(now)
            process.take(now)
            if step % 3 == 0 and process.limiter.in_flight > 1:
                process.limiter.finish()
        assert sum(process.limiter.in_flight for process in processes) <= 5


def test_without_the_store_each_process_applies_its_share():
    account = Account(Allowance(rate=100, burst=100, day=10_000, concurrency=8))
    processes = [Process(str(i), account, 1 / 4) for i in range(4)]
    before = offered(processes, per_s=1000, seconds=2)
    for process in processes:
        process.away = True
    alone = offered(processes, per_s=1000, seconds=20, start=2.0)
    assert 2000 * 0.95 <= alone <= 2000 + 100
    assert all(process.limiter.standalone and process.limiter.slots == 2 for process in processes)
    for process in processes:
        process.away = False
    account.at = 22.0
    again = offered(processes, per_s=1000, seconds=20, start=22.0)
    assert 2000 * 0.95 <= again <= 2000 + 100 + 100
    for step in range(100):
        for process in processes:
            process.tick(42.0 + step * TICK_S)
    assert account.used == before + alone + again, "the quota is charged for the usage meanwhile"


def test_a_limiter_that_starts_without_the_store_has_its_share_at_once():
    process = Process("a", Account(Allowance(rate=10, burst=40)), share=1 / 4)
    process.away = True
    taken = [process.take(0.0) for _ in range(4)]
    process.tick(0.0)
    taken += [process.take(0.001) for _ in range(7)]
    assert taken.count(True) == 10


def test_a_stopping_process_returns_its_tokens():
    process = Process("a", Account(Allowance(rate=1, burst=10, concurrency=3, day=9)))
    for now in (0.0, 0.02):
        process.take(now)
        process.tick(now)
    lease_request = process.limiter.release_request(DAY)
    assert (lease_request.rate.wanted, lease_request.day_quota.wanted, lease_request.slots) == (
        0,
        0,
        TokenHolding(0, 0),
    )
    assert process.account.tokens + lease_request.rate.held == pytest.approx(8, abs=0.1)


def test_tokens_taken_while_the_account_answers_stay_taken():
    leased = LeasedTokens("rate", 10)
    leased.held = 4
    asked = leased.holding(8)
    leased.held -= 2
    leased.apply(asked, granted=8, available=1)
    assert (leased.held, leased.remaining) == (6, 7)


def changed(process: Process, allowance: Allowance, now: float) -> None:
    """Change the limits, in the process and in the account."""
    process.account.allowance = allowance
    process.limiter.change(allowance, now)


def taken(process: Process, now: float, count: int = 20) -> int:
    """Send ``count`` short requests at one time. Return how many were admitted."""
    found = [process.take(now) for _ in range(count)]
    for _ in range(sum(found)):
        process.limiter.finish()
    return sum(found)


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("burst", [2, 6, 12])
def test_a_changed_bucket_is_not_full_again(settled, burst):
    process = Process("a", Account(Allowance(rate=0.01, burst=6)))
    assert taken(process, 0.0, 2) == 2
    if settled:
        process.tick(0.0)
        process.tick(0.02)
    changed(process, Allowance(rate=0.02, burst=burst), 0.03)
    assert taken(process, 0.03) <= min(burst, burst - 2 if burst > 6 else 4)
    for tick in range(5):
        process.tick(0.04 + tick * TICK_S)
    assert taken(process, 0.2) == 0


def test_an_unused_bucket_is_full_at_any_size():
    for burst in (3, 9):
        process = Process("a", Account(Allowance(rate=0.01, burst=6)))
        process.limiter.change(Allowance(rate=0.01, burst=burst), 0.0)
        assert taken(process, 0.0) == burst


@pytest.mark.parametrize(("day", "more"), [(2, 0), (4, 0), (6, 2), (30, 20)])
@pytest.mark.parametrize("settled", [False, True])
def test_a_changed_quota_counts_what_was_used(day, more, settled):
    process = Process("a", Account(Allowance(day=5)))
    assert taken(process, 0.0, 4) == 4
    if settled:
        process.tick(0.0)
        process.tick(0.02)
    changed(process, Allowance(day=day), 0.03)
    assert taken(process, 0.03) == more
    process.tick(0.04)
    assert process.account.used - day_tokens(process).held >= 4 + more, "all of it is charged"


def day_tokens(process: Process) -> LeasedTokens:
    assert process.limiter.day_quota is not None
    return process.limiter.day_quota


def test_an_answer_to_limits_that_have_changed_since():
    process = Process("a", Account(Allowance(rate=1, burst=50, day=100)))
    assert process.take(0.0)
    limiter = process.limiter
    lease_request = limiter.lease_request(0.0, DAY)
    assert lease_request is not None
    granted = process.account.settle("a", lease_request, 0.0)
    changed(process, Allowance(rate=1, burst=3, day=4, month=8, concurrency=2), 0.0)
    limiter.apply(lease_request, granted, 0.0)
    assert max(rate_tokens(limiter).held, rate_tokens(limiter).available) == 3
    assert day_tokens(process).available <= 3, "one is used"
    assert limiter.month_quota is not None
    assert limiter.month_quota.available == 8, "the account did not report it"
    assert limiter.take(0.0) is None
    assert limit_of(limiter.take(0.0)) == "concurrency", "requests in flight still count"


@pytest.mark.parametrize("borrowed", [0, 5])
def test_a_limit_lowered_while_the_account_answers_makes_no_debt(borrowed):
    """Tokens that were reported as held, and then lost by a change, do not count as spent."""
    leased = LeasedTokens("rate", 100)
    leased.held, leased.borrowed, leased.available = 98, borrowed, 0
    asked = leased.holding(0)
    leased.change(10)
    leased.apply(asked, granted=0, available=10)
    assert leased.held == 0
    assert leased.holding(0).held == 0


def test_when_to_retry_follows_the_new_rate():
    process = Process("a", Account(Allowance(rate=0.001, burst=1)))
    assert taken(process, 0.0) == 1
    process.tick(0.0)
    process.limiter.change(Allowance(rate=0.1, burst=1), 0.0)
    refusal = process.limiter.take(0.0)
    assert limit_of(refusal) == "rate"
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(10.0)
