"""Collect the time that replicas report, add it to the cost ledger by hour, and report the costs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from services.autoscaler.adapters import metrics
from services.autoscaler.adapters.history.cost_store import CostStore
from services.autoscaler.domain.costs.budgets import (
    BudgetUsed,
    Spending,
    periods,
    refusal,
    spendings,
    used_up,
)
from services.autoscaler.domain.costs.forecast import HISTORY_S, forecast
from services.autoscaler.domain.costs.lives import LifeBook
from services.autoscaler.domain.costs.report import By, idle_per_month, pending_rows, report
from services.autoscaler.domain.launcher import Running
from services.autoscaler.domain.snapshot import Snapshot
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.price_file import PriceFile
from tidegate.kernel.protocol.cost_facts import NANOS, CostFacts, DeploymentCosts
from tidegate.kernel.protocol.models import Deployment, DesiredState
from tidegate.kernel.protocol.prices import Rate, rate_of
from tidegate.kernel.protocol.reserves import holders
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

BOOK_EVERY_S = 10.0
RETRY_S = 1.0
RETIRE_EVERY_S = 3600.0


class CostLedger:
    """The leader's cost ledger.

    The control loop calls :meth:`note` in each round. :meth:`run` adds time and costs to the ledger in the
    background. ``waiting`` returns the waiting workers of warm pools, which cost as much as replicas.
    """

    def __init__(
        self,
        store: Store,
        costs: CostStore,
        prices: PriceFile,
        waiting: Callable[[], Sequence[Running]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._costs = costs
        self._waiting = waiting
        self._clock = clock
        self._book = LifeBook()
        self._desired_state: DesiredState | None = None
        self._deployments: Mapping[str, Deployment] = {}
        self._holders: Mapping[str, str] = {}
        self._due = asyncio.Event()
        self._leads = False
        self._turn = asyncio.Lock()
        self._used: dict[str, BudgetUsed] = {}
        self.prices = prices
        # The Deployments that have used up a budget, each with a description of the budget.
        self.over_budget: dict[str, str] = {}

    def take_over(self, desired_state: DesiredState | None) -> None:
        """Read the replicas whose time the former leader had not completely added to the ledger.

        Call this when the process becomes the leader. ``desired_state``: the last known desired state. Its
        budgets apply from the first round on.
        """
        self._leads = True
        if desired_state is not None:
            self._learn(desired_state)
        self._book = LifeBook(self._costs.lives())
        self._used = self._used_up()
        self.over_budget = {name: used.words for name, used in self._used.items()}

    def note(self, snapshot: Snapshot, now: float) -> None:
        """Record the replicas of a round. Do nothing if the launcher did not list them.

        ``now``: the time when the launcher listed the replicas.
        """
        if snapshot.running is None:
            return
        if snapshot.desired_state is not None and snapshot.desired_state is not self._desired_state:
            self._desired_state, before = snapshot.desired_state, self._limited()
            self._learn(snapshot.desired_state)
            if {name: each.scaling for name, each in before.items()} != {
                name: each.scaling for name, each in self._limited().items()
            }:
                self._due.set()  # book now, so that a changed budget applies immediately
        devices = {name: each.device for name, each in (snapshot.reports or {}).items() if each.device}
        running = [*snapshot.running, *self._waiting()]
        if self._book.note(running, self._deployments, devices, self.prices.current(), now):
            self._due.set()

    def _learn(self, desired_state: DesiredState) -> None:
        self._deployments = {each.name: each for each in desired_state.deployments}
        self._holders = holders(desired_state)

    def killed(self, replica: str, at: float) -> None:
        """Record that a replica was killed at the time ``at``. Later rounds do not show when it ended."""
        life = self._book.lives.get(replica)
        if life is not None and life.end(at):
            self._due.set()

    async def run(self) -> None:
        """Add time and costs to the ledger every few seconds, and when a replica ends, until cancelled."""
        retired_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), BOOK_EVERY_S)
            self._due.clear()
            try:
                await self.collect()
                if self._clock() - retired_at >= RETIRE_EVERY_S:
                    retired_at = self._clock()
                    await asyncio.to_thread(self._costs.retire, retired_at)
            except Unavailable as error:
                log.warning(
                    "costs could not be booked; the autoscaler books them later",
                    extra={"problem": error.message},
                )
            except Exception:  # budgets depend on the ledger, so this task must survive every error
                log.exception("costs could not be booked; the autoscaler books them later")
            await asyncio.sleep(RETRY_S)

    async def collect(self) -> None:
        """Add to the ledger the time that workers have reported since the last call of this method.

        Do nothing if this process does not lead. Raise ``Unavailable`` if the store or the cost ledger's file
        fails.
        """
        if not self._leads:
            return
        async with self._turn:
            try:
                reports = await self._store.times()
            except StoreUnavailable as error:
                raise Unavailable(f"The replicas' times cannot be read: {error.message}") from None
            before = self._book.copy()
            bookings, closed = self._book.book(reports, self.prices.current(), self._clock())
            lives = list(self._book.lives.values())
            try:
                await asyncio.to_thread(self._costs.book, bookings, lives, closed)
            except BaseException:
                self._book.restore(before)
                raise
            metrics.book(bookings)
            self._used = await asyncio.to_thread(self._used_up)
            self.over_budget = {name: used.words for name, used in self._used.items()}
            metrics.show_budgets(self._limited(), self.over_budget)
            # An error of the store does no harm here: old reports expire by themselves, and the next booking
            # publishes the cost facts for the gateways.
            with contextlib.suppress(StoreUnavailable):
                await self._store.forget_times(closed)
                await self._store.publish_cost_facts(self._facts())

    async def report(self, since: float, until: float, by: By, deployment: str | None) -> dict[str, Any]:
        """Return the costs of the hours that begin in a period.

        If the period lasts until now, the report includes the time that is not in the ledger yet.
        """
        with contextlib.suppress(Unavailable):
            await self.collect()
        rows = await asyncio.to_thread(self._costs.amounts, since, until)
        if until >= self._clock():
            rows += pending_rows(self._book.lives.values())
        chosen = [row for row in rows if deployment in (None, row[0].deployment)]
        found = {"since": since, "until": until, **report(chosen, by, self.prices.current())}
        now = self._clock()
        costs = await asyncio.to_thread(self._costs.by_hour, now - HISTORY_S, deployment)
        month = forecast(costs, now)
        first = await asyncio.to_thread(self._costs.first_hour)
        covered_s = min(until, now) - max(since, first if first is not None else since)
        return found | {
            "month": month.view() if month is not None else None,
            "idle_per_month": idle_per_month(found["parts"], covered_s),
            "budgets": self._budgets(deployment),
            "problem": self.prices.problem,
        }

    def _budgets(self, deployment: str | None) -> list[dict[str, Any]]:
        """Return the budgets of a Deployment, or of all Deployments if ``deployment`` is None.

        If ``deployment`` is None, the Deployments of reserved replicas are left out, because they use another
        Deployment's budget.
        """
        names = self._limited().keys() - self._holders.keys() if deployment is None else {deployment}
        limited = {name: each for name, each in self._limited().items() if name in names}
        spent = self._spendings(limited)
        return [
            {
                "deployment": name,
                "day": spent[name].day,
                "max_cost_per_day": each.scaling.max_cost_per_day,
                "month": spent[name].month,
                "max_cost_per_month": each.scaling.max_cost_per_month,
                "used_up": self.over_budget.get(name, ""),
            }
            for name, each in sorted(limited.items())
        ]

    def _used_up(self) -> dict[str, BudgetUsed]:
        limited = self._limited()
        currency = self.prices.current().currency
        return used_up(limited, self._spendings(limited), currency, self._clock()) if limited else {}

    def _limited(self) -> dict[str, Deployment]:
        """Return the Deployments that have a budget."""
        return {
            name: each
            for name, each in self._deployments.items()
            if each.scaling.max_cost_per_day is not None or each.scaling.max_cost_per_month is not None
        }

    def _spendings(self, limited: Iterable[str]) -> dict[str, Spending]:
        days, months = (self._costs.spent(since) for since in periods(self._clock()))
        return spendings(limited, days, months, self._holders)

    def _facts(self) -> CostFacts:
        """Return the facts for gateways: cost rates, token prices, and Deployments with a used-up budget."""
        prices = self.prices.current()
        found = {}
        for name, deployment in self._deployments.items():
            used = self._used.get(name)
            alone = self._rate_of(deployment).per_hour * NANOS / 3.6e9
            holder = self._holders.get(name, name)
            refused = refusal(deployment, used, holder) if used is not None else ""
            until = used.until if used is not None else 0.0
            found[name] = DeploymentCosts(alone * self._book.sharing.get(name, 1.0), refused, until, alone)
        return CostFacts(prices.currency, found, prices.tokens)

    def per_hour(self) -> dict[str, float]:
        """Return how much the running replicas of each Deployment cost per hour."""
        found = dict.fromkeys(self._deployments, 0.0)
        for life in self._book.lives.values():
            if life.gone_at is None and life.deployment in found:
                found[life.deployment] += life.rate.per_hour
        return found

    def rates(self) -> dict[str, Any]:
        """Return the price list, and the price of a replica of each Deployment."""
        prices = self.prices.current()
        return {
            "file": str(self.prices.path) if self.prices.path else None,
            "problem": self.prices.problem,
            "prices": prices.model_dump(by_alias=True),
            "deployments": {
                name: self._rate_of(each).model_dump() for name, each in sorted(self._deployments.items())
            },
        }

    def _rate_of(self, deployment: Deployment) -> Rate:
        known = (life.rate for life in self._book.lives.values() if life.deployment == deployment.name)
        return next(known, None) or rate_of(deployment, self.prices.current())
