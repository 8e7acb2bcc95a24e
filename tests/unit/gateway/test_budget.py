"""Budgets of money: a cap holds over eight gateway processes with 200 callers at the same time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from services.gateway.domain.budget import Reserved
from services.gateway.domain.key_limiter import KeyLimiter, LimitReached
from services.gateway.domain.lease_messages import LeaseGrant, LeaseRequest, TokenHolding
from services.gateway.domain.request_costs import FIRST_US, RequestCosts
from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel.errors import TooMany
from tidegate.kernel.protocol.access import Allowance
from tidegate.kernel.protocol.cost_facts import CostFacts, DeploymentCosts
from tidegate.kernel.protocol.prices import TokenPrice

pytestmark = pytest.mark.unit

TICK_S, DAY = 0.02, "2026-01-31"
COST = 1_000


@dataclass
class Account:
    """The count of one period, as `limits_settle.lua` keeps it."""

    limit: int
    used: int = 0

    def settle(self, request: LeaseRequest) -> LeaseGrant:
        held, left = self._exchange(request.day_budget)
        return LeaseGrant(day_budget=held, day_budget_left=max(0, left))

    def _exchange(self, pair: TokenHolding) -> tuple[int, int]:
        left, have, want = self.limit - self.used, pair.held, pair.wanted
        if have < 0:
            left, have = left + have, 0
        if have > want:
            left, have = max(left, min(self.limit, left + have - want)), want
        else:
            more = min(want - have, max(0, left))
            left, have = left - more, have + more
        self.used = self.limit - left
        return have, left


@dataclass
class Process:
    account: Account
    running: list[tuple[float, Reserved]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limiter = KeyLimiter("key", Allowance(day_budget=self.account.limit), lambda _: None)
        self.limiter.share = 1 / 8

    def settle(self, now: float) -> None:
        request = self.limiter.lease_request(now, DAY) if self.limiter.active else None
        if request is not None:
            self.limiter.apply(request, self.account.settle(request), now)


def held(limiter: KeyLimiter) -> list[float]:
    assert limiter.budget is not None
    return [tokens.held for tokens in limiter.budget.tokens]


def limit_of(refused: LimitReached | None) -> str:
    return "" if refused is None else refused.limit


@pytest.mark.parametrize("seed", range(6))
def test_a_cap_holds_with_200_callers_and_8_processes(seed):
    """Every caller sends again at once. The cap is passed by far less than a lease, the cost of 0.1 s."""
    draw = random.Random(seed)
    account = Account(limit=3_000 * COST)
    processes = [Process(account) for _ in range(8)]
    spent, now = 0, 0.0
    while now < 20.0:
        for process in processes:
            for ends_at, reserved in [each for each in process.running if each[0] <= now]:
                process.running.remove((ends_at, reserved))
                process.limiter.finish(reserved, COST)
                spent += COST
            while len(process.running) < 25 and process.limiter.take(now, COST) is None:
                process.running.append((now + draw.uniform(0.005, 0.2), process.limiter.reserved))
            if draw.random() < 0.9:  # some settlements are late
                process.settle(now)
        now += TICK_S
    assert account.limit * 0.98 <= spent <= account.limit + 5 * COST


def test_a_reservation_becomes_the_cost():
    limiter = KeyLimiter("key", Allowance(day_budget=1_000), lambda _: None)
    assert limiter.take(0.0, 200) is None
    limiter.finish(limiter.reserved, 100)
    assert held(limiter) == [-100]
    assert limit_of(limiter.take(0.0, 500)) == "day_budget"


def test_a_refused_request_reserves_nothing():
    limiter = KeyLimiter("key", Allowance(day_budget=1_000, month_budget=100), lambda _: None)
    assert limit_of(limiter.take(0.0, 200)) == "month_budget"
    assert held(limiter) == [0, 0]


def test_a_new_day_forgets_the_reservations_of_the_old_one():
    limiter = KeyLimiter("key", Allowance(day_budget=1_000, month_budget=1_000), lambda _: None)
    assert limiter.take(0.0, 200) is None
    reserved = limiter.reserved
    limiter.new_day(new_month=False)
    limiter.finish(reserved, 50)
    assert held(limiter) == [-50, -50]


def test_a_removed_budget_limits_nothing():
    limiter = KeyLimiter("key", Allowance(day_budget=10, rate=100, burst=100), lambda _: None)
    assert limiter.take(0.0, 500) is not None
    limiter.change(Allowance(rate=100, burst=100), 0.0)
    assert limiter.take(0.0, 500) is None


def a_route(name: str = "d", model: str = "m") -> DeploymentRoute:
    return DeploymentRoute(name, model, "1", "onnx", None, None, 1, True, True, 1)  # type: ignore[arg-type]


def test_the_cost_of_an_answer():
    costs = RequestCosts()
    assert costs.of(a_route(), 1_000) == 0, "no rates yet"
    facts = CostFacts(
        "EUR",
        {"d": DeploymentCosts(11.0), "e": DeploymentCosts(20.0)},
        {"m": TokenPrice(input=2.0, cached=1.0)},
    )
    costs.replace(CostFacts.from_json(facts.to_json()))
    assert costs.of(a_route(model="other"), 1_000) == 11_000
    assert costs.of(a_route("new", "other"), 1_000) == 20_000, (
        "an unknown Deployment costs like the dearest one"
    )
    assert costs.of(a_route(), 0, tokens_in=1_000_000) == 2_000_000_000
    assert costs.of(a_route(), 0, tokens_in=1_000_000, tokens_cached=500_000) == 1_500_000_000
    assert costs.of(a_route(), 0, tokens_in=1_000_000, tokens_cached=9_000_000) == 1_000_000_000


def test_a_request_reserves_what_it_costs_alone():
    """A request that shared its call, in a replica with other calls, may be alone the next time."""
    costs = RequestCosts()
    costs.replace(CostFacts("EUR", {"d": DeploymentCosts(10.0, alone=40.0)}))
    assert costs.most("e") == 10 * FIRST_US, "before the first answer"
    costs.learn("e", a_route(model="other"), 1_000, compute_us=100, whole_us=800)
    assert (costs.most("e"), costs.mean("e")) == (32_000, 1_000)
    costs.learn("e", a_route(model="other"), 2_000, compute_us=200, whole_us=1_000)
    assert (costs.most("e"), costs.mean("e")) == (40_000, 1_100), "a dearer call counts at once"
    costs.learn("e", a_route(model="other"), 0, compute_us=0, whole_us=0)
    assert costs.most("e") == 39_600, "a cheaper one slowly"


def test_jobs_are_charged_before_the_first_direct_answer() -> None:
    """Else a caller that sends only jobs would never use up its budget."""
    costs = RequestCosts()
    costs.replace(CostFacts("EUR", {"d": DeploymentCosts(10.0)}))
    assert costs.mean("e") == 10 * FIRST_US


def test_a_deployment_over_its_budget_is_refused_until_the_renewal():
    costs = RequestCosts()
    costs.replace(CostFacts("EUR", {"d": DeploymentCosts(1.0, "d takes no requests", 100.0)}))
    with pytest.raises(TooMany, match="takes no requests") as refused:
        costs.check_budget("d", 40.0)
    assert (refused.value.reason, refused.value.retry_after_s) == ("budget_exhausted", 60.0)
    costs.check_budget("d", 100.0)
    costs.check_budget("other", 40.0)


def test_a_request_that_needs_a_lease_may_come_back_soon():
    process = Process(Account(limit=1_000))
    refused = process.limiter.take(0.0, 900)
    assert refused is not None
    assert refused.soon, "the account has room"
    process.settle(TICK_S)
    assert process.limiter.take(2 * TICK_S, 900) is None
    process.limiter.finish(process.limiter.reserved, 900)
    process.settle(3 * TICK_S)
    last = process.limiter.take(4 * TICK_S, 900)
    assert last is not None
    assert not last.soon


def settle_twice(process: Process, now: float) -> None:
    """The first settlement reports the end of a request, the second one that the caller is idle."""
    process.settle(now)
    process.settle(now + 2.0)


def test_the_account_learns_a_cost_after_an_idle_time():
    """A stream may end when the process has long returned the caller's other leases."""
    process = Process(Account(limit=1_000_000))
    assert process.limiter.take(0.0, 20_000) is None
    reserved = process.limiter.reserved
    settle_twice(process, 2.0)
    assert not process.limiter.active
    process.limiter.finish(reserved, 500)
    settle_twice(process, 10.0)
    assert process.account.used == 500
    assert not process.limiter.active


def test_the_account_learns_the_cost_of_a_request_that_ended_while_it_answered():
    process = Process(Account(limit=1_000_000))
    assert process.limiter.take(0.0, 20_000) is None
    process.settle(2.0)
    request = process.limiter.lease_request(4.0, DAY)
    assert request is not None
    process.limiter.finish(process.limiter.reserved, 500)
    process.limiter.apply(request, process.account.settle(request), 4.0)
    settle_twice(process, 6.0)
    assert process.account.used == 500
    assert not process.limiter.active


def test_a_new_budget_gets_no_reservation_of_a_removed_one():
    limiter = KeyLimiter("key", Allowance(day_budget=1_000), lambda _: None)
    assert limiter.take(0.0, 200) is None
    limiter.finish(limiter.reserved, 200)
    limiter.change(Allowance(rate=100, burst=100), 0.0)
    assert limiter.take(0.0, 200) is None
    reserved = limiter.reserved
    limiter.change(Allowance(day_budget=1_000), 0.0)
    limiter.finish(reserved, 50)
    assert held(limiter) == [-50]


def test_the_first_request_may_borrow_only_the_share_of_the_process():
    """When the limits were set, this process did not know the others yet."""

    def activate(limiter: KeyLimiter) -> None:
        limiter.share = 1 / 8

    limiter = KeyLimiter("key", Allowance(day_budget=1_000), activate)
    assert limit_of(limiter.take(0.0, 200)) == "day_budget"
    assert limiter.take(0.0, 30) is None
