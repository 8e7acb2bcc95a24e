"""Budgets of Deployments: when one is used up, and what it does to the replicas."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.autoscaler.domain.bounds import bounds
from services.autoscaler.domain.costs.budgets import Spending, month_end, periods, refusal, spendings, used_up
from services.autoscaler.domain.recording import LastRound, read_round, write_round
from tests.unit.autoscaler.conftest import World, a_deployment

pytestmark = pytest.mark.unit

NOW = datetime(2026, 12, 31, 13, tzinfo=UTC).timestamp()


def test_periods():
    day, month = periods(NOW)
    assert datetime.fromtimestamp(day, UTC) == datetime(2026, 12, 31, tzinfo=UTC)
    assert datetime.fromtimestamp(month, UTC) == datetime(2026, 12, 1, tzinfo=UTC)
    assert datetime.fromtimestamp(month_end(NOW), UTC) == datetime(2027, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("spent", "words"),
    [
        (Spending(4.9, 50), None),
        (Spending(5, 50), "budget of 5 EUR a day"),
        (Spending(5, 100), "budget of 100 EUR a month"),
    ],
)
def test_used_up(spent, words):
    deployment = a_deployment(scaling={"max_cost_per_day": 5, "max_cost_per_month": 100})
    found = used_up({"d": deployment}, {"d": spent}, "EUR", NOW)
    assert (words is None and not found) or words in found["d"].words


def test_bounds_over_budget():
    kept = a_deployment(min_replicas=2, max_replicas=9, scaling={"max_cost_per_day": 5})
    stopped = a_deployment(min_replicas=2, max_replicas=9, scaling={"over_budget": "stop"})
    found = bounds(kept, NOW, 0.0, "the budget is used up")
    assert (found.low, found.high, found.high_rule) == (2, 2, "budget")
    assert bounds(stopped, NOW, 0.0, "the budget is used up").high == 0
    assert bounds(kept, NOW, 0.0).high == 9


def test_only_a_deployment_without_replicas_refuses_requests():
    used = used_up({"d": a_deployment(scaling={"max_cost_per_day": 5})}, {"d": Spending(5, 5)}, "EUR", NOW)[
        "d"
    ]
    assert refusal(a_deployment(min_replicas=1), used, "d") == ""
    assert "takes no requests" in refusal(a_deployment(min_replicas=0), used, "d")
    stopped = a_deployment(min_replicas=1, scaling={"over_budget": "stop"})
    assert "raise the budget: `tidegate policy d --set" in refusal(stopped, used, "d")


def test_a_deployment_and_its_reserves_spend_from_one_budget():
    days = {"d": 3.0, "d-for-shop": 1.5, "d-for-app": 1.0, "other": 7.0}
    months = {"d": 20.0, "d-for-app": 5.0}
    found = spendings(["d", "d-for-shop", "other"], days, months, {"d-for-shop": "d", "d-for-app": "d"})
    assert found == {"d": Spending(5.5, 25.0), "d-for-shop": Spending(5.5, 25.0), "other": Spending(7.0, 0.0)}


def test_over_a_budget_a_deployment_keeps_its_minimum():
    world = World(a_deployment(min_replicas=2, max_replicas=8, scaling={"max_cost_per_day": 5}))
    world.call_ms = 100.0
    world.outstanding["digits-v1"] = 400
    world.run(30)
    assert world.state.deployments["digits-v1"].target == 8
    world.over_budget = {"digits-v1": "the budget of 5 USD a day is used up"}
    world.round()
    memory = world.state.deployments["digits-v1"]
    assert (memory.target, memory.rule) == (2, "budget")
    assert "the budget of 5 USD a day is used up" in world.decisions[-1].reason
    world.over_budget = {}
    world.round()
    assert world.state.deployments["digits-v1"].target == 8


def test_a_recorded_round_has_the_budgets():
    world = World(a_deployment())
    world.over_budget = {"digits-v1": "the budget of 5 USD a day is used up"}
    document = write_round(world.snapshot(), LastRound())
    assert read_round(document, LastRound()).over_budget == world.over_budget
    del document["over_budget"]  # as an earlier version wrote it
    assert read_round(document, LastRound()).over_budget == {}
