"""The budgets of Deployments: the most that the time of all their replicas may cost in a day or month.

The cost of a Deployment's reserved replicas also counts against the Deployment's budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from tidegate.kernel.protocol.models import Deployment


class Spending(NamedTuple):
    """The costs of a Deployment so far in the current calendar day and calendar month (UTC)."""

    day: float = 0.0
    month: float = 0.0


class BudgetUsed(NamedTuple):
    """A budget that is used up. ``until``: when it is renewed, in seconds since the epoch."""

    words: str
    until: float


def periods(now: float) -> tuple[float, float]:
    """Return the beginning of the day and of the month that contain ``now``."""
    day = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return day.timestamp(), day.replace(day=1).timestamp()


def month_end(now: float) -> float:
    """Return the end of the month that contains ``now``."""
    first = datetime.fromtimestamp(periods(now)[1], UTC)
    return (first + timedelta(days=32)).replace(day=1).timestamp()


def spendings(
    names: Iterable[str], days: Mapping[str, float], months: Mapping[str, float], holders: Mapping[str, str]
) -> dict[str, Spending]:
    """Return the spending that counts against each Deployment's budgets.

    ``days`` and ``months`` have the costs of the current day and month. ``holders`` maps the name of each
    Deployment of reserved replicas to the Deployment whose budgets it shares.
    """
    day, month = _together(days, holders), _together(months, holders)
    return {
        name: Spending(day.get(holders.get(name, name), 0.0), month.get(holders.get(name, name), 0.0))
        for name in names
    }


def _together(costs: Mapping[str, float], holders: Mapping[str, str]) -> dict[str, float]:
    """Return the cost of each Deployment, including its reserved replicas."""
    found: dict[str, float] = {}
    for name, cost in costs.items():
        holder = holders.get(name, name)
        found[holder] = found.get(holder, 0.0) + cost
    return found


def used_up(
    deployments: Mapping[str, Deployment], spendings: Mapping[str, Spending], currency: str, now: float
) -> dict[str, BudgetUsed]:
    """Return the Deployments that have used up a budget, each with this budget.

    If a Deployment has used up both budgets, return the budget of the month.
    """
    found = {}
    for name, deployment in deployments.items():
        scaling, spent = deployment.scaling, spendings.get(name, Spending())
        limits = (
            ("month", spent.month, scaling.max_cost_per_month, month_end(now)),
            ("day", spent.day, scaling.max_cost_per_day, periods(now)[0] + 86_400),
        )
        for period, cost, limit, until in limits:
            if limit is not None and cost >= limit:
                found[name] = BudgetUsed(f"the budget of {limit:g} {currency} a {period} is used up", until)
                break
    return found


def refusal(deployment: Deployment, used: BudgetUsed, holder: str) -> str:
    """Return the error message for requests to a Deployment whose budget is used up.

    Return an empty string if the Deployment keeps its minimum of replicas and still takes requests.
    ``holder``: the Deployment that has the budget.
    """
    if deployment.scaling.over_budget == "minimum" and deployment.min_replicas:
        return ""
    return (
        f"Deployment {deployment.name} takes no requests: {used.words}. Retry after the time in Retry-After, "
        "or ask an operator to raise the budget: "
        f"`tidegate policy {holder} --set max_cost_per_day=N` (or max_cost_per_month=N)"
    )
