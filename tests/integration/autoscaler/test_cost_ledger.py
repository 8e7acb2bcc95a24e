"""The cost ledger with a real store and a real file: reports of workers become costs, rates and budgets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.autoscaler.adapters.history.cost_store import CostStore
from services.autoscaler.application.cost_ledger import CostLedger
from services.autoscaler.domain.costs.lives import HOUR_S, NS
from services.autoscaler.domain.launcher import Running
from services.autoscaler.domain.snapshot import Snapshot
from tidegate.kernel.price_file import PriceFile
from tidegate.kernel.protocol.models import Deployment, DesiredState, Endpoint, Target
from tidegate.kernel.protocol.replica_time import BUSY, IDLE, Part, ReplicaTime, Spent
from tidegate.kernel.protocol.reserves import with_reserves
from tidegate.kernel.store import Store

NOW = datetime(2026, 6, 15, 12, 30, tzinfo=UTC).timestamp()
SINCE = NOW // HOUR_S * HOUR_S


@pytest.fixture
async def store(valkey_url: str) -> AsyncIterator[Store]:
    found = Store.connect(valkey_url)
    yield found
    await found.forget_times(list(await found.times()))
    await found.close()


def a_deployment(name: str, **scaling: Any) -> Deployment:
    fields = {"name": name, "model": "m", "version": 1, "revision": 1, "created_at": datetime.now(UTC)}
    return Deployment.model_validate({**fields, "scaling": {"price_per_hour": 3.6, **scaling}})


def a_ledger(store: Store, path: Path, clock: list[float], *deployments: Deployment) -> CostLedger:
    ledger = CostLedger(store, CostStore(path), PriceFile(None), list, lambda: clock[0])
    ledger.take_over(desired(*deployments))
    return ledger


def desired(*deployments: Deployment, **fields: Any) -> DesiredState:
    whole = {"revision": 1, "versions": [], "endpoints": [], **fields}
    return DesiredState(deployments=list(deployments), **whole)


def seen(deployment: Deployment, *replicas: str) -> Snapshot:
    rows = tuple(Running(each, deployment.name, 0, 1, 1, True, NOW - 100) for each in replicas)
    return Snapshot(desired(deployment), rows, {}, None)


async def worked(store: Store, replica: str, deployment: str, busy_s: int, idle_s: int) -> None:
    parts = {
        Part(BUSY, "", "ann", "digits"): Spent(busy_s * NS, busy_s * 10, busy_s * 10),
        Part(IDLE): Spent(idle_s * NS),
    }
    await store.report_time(ReplicaTime(replica, deployment, 0, False, parts, 2 * busy_s * NS))


async def test_reports_become_costs_once(store: Store, fresh: Any, tmp_path: Path):
    """A second autoscaler continues on the file of the first, and books nothing twice."""
    deployment, clock = a_deployment(fresh("d")), [NOW]
    replica = f"{deployment.name}-0-1"
    ledger = a_ledger(store, tmp_path / "costs.db", clock, deployment)
    ledger.note(seen(deployment, replica), NOW)
    await worked(store, replica, deployment.name, 40, 50)
    await ledger.collect()
    after = a_ledger(store, tmp_path / "costs.db", clock, deployment)
    clock[0] = NOW + 10
    after.note(seen(deployment, replica), NOW + 10)
    await worked(store, replica, deployment.name, 45, 55)
    found = await after.report(SINCE, NOW + 10, "key", deployment.name)
    assert found["replica_seconds"] == pytest.approx(110) == found["observed_seconds"]
    assert found["total"]["seconds"] == pytest.approx({BUSY: 45, IDLE: 55, "pending": 10})
    (item,) = found["items"]
    assert (item["key"], item["requests"]) == ("ann", 450)
    assert item["cost"] == pytest.approx(0.110)
    after.note(seen(deployment), NOW + 10.2)
    await after.collect()
    assert replica not in await store.times(), "the life is booked completely"


async def test_gateways_learn_rates_and_refusals(store: Store, fresh: Any, tmp_path: Path):
    deployment = a_deployment(fresh("d"), max_cost_per_day=0.05, over_budget="stop")
    replica, clock = f"{deployment.name}-0-1", [NOW]
    ledger = a_ledger(store, tmp_path / "costs.db", clock, deployment)
    ledger.note(seen(deployment, replica), NOW)
    await worked(store, replica, deployment.name, 10, 30)
    await ledger.collect()
    facts = await store.cost_facts()
    assert facts is not None
    rate = facts.deployments[deployment.name]
    assert (rate.alone, rate.nanos_per_us, rate.refused) == (1.0, 0.5, ""), "two calls at a time"
    await worked(store, replica, deployment.name, 20, 30)
    await ledger.collect()
    assert "budget of 0.05 USD a day" in ledger.over_budget[deployment.name]
    facts = await store.cost_facts()
    assert facts is not None
    rate = facts.deployments[deployment.name]
    assert "takes no requests" in rate.refused
    assert datetime.fromtimestamp(rate.until, UTC) == datetime(2026, 6, 16, tzinfo=UTC)
    again = a_ledger(store, tmp_path / "costs.db", clock, deployment)
    assert deployment.name in again.over_budget, "known from the first round on"


async def test_reserved_replicas_spend_from_the_budget_of_their_deployment(
    store: Store, fresh: Any, tmp_path: Path
):
    """Neither spends the budget alone."""
    shared = a_deployment(fresh("d"), max_cost_per_day=0.05, over_budget="stop")
    target = Target(deployment=shared.name, weight=1)
    endpoint = Endpoint(name="shop", targets=[target], reserved=1, revision=1)
    state = with_reserves(desired(shared, endpoints=[endpoint]))
    reserve = f"{shared.name}-for-shop"
    rows = tuple(Running(f"{name}-0-1", name, 0, 1, 1, True, NOW - 100) for name in (shared.name, reserve))
    ledger = a_ledger(store, tmp_path / "costs.db", [NOW])
    ledger.note(Snapshot(state, rows, {}, None), NOW)
    await worked(store, rows[0].replica, shared.name, 10, 20)
    await ledger.collect()
    assert ledger.over_budget == {}
    await worked(store, rows[1].replica, reserve, 10, 20)
    await ledger.collect()
    assert ledger.over_budget.keys() == {shared.name, reserve}
    facts = await store.cost_facts()
    assert facts is not None
    assert f"`tidegate policy {shared.name} --set" in facts.deployments[reserve].refused
    (budget,) = (await ledger.report(SINCE, NOW, "version", None))["budgets"]
    assert (budget["deployment"], budget["day"]) == (shared.name, pytest.approx(0.06))


async def test_a_standby_books_nothing(store: Store, fresh: Any, tmp_path: Path):
    deployment = a_deployment(fresh("d"))
    ledger = CostLedger(store, CostStore(tmp_path / "costs.db"), PriceFile(None), list, lambda: NOW)
    before = await store.cost_facts()
    await worked(store, f"{deployment.name}-0-1", deployment.name, 1, 1)
    assert (await ledger.report(SINCE, NOW, "version", None))["items"] == []
    assert await store.cost_facts() == before
