"""The cost ledger on a real SQLite file: bookings add up, survive a restart, and become days."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.autoscaler.adapters.history.cost_store import DAY_S, HOURS_KEPT_S, CostStore
from services.autoscaler.domain.costs.lives import HOUR_S, NS, Amount, Life, Place
from tidegate.kernel.protocol.prices import Rate
from tidegate.kernel.protocol.replica_time import BUSY, IDLE, Part, Spent

RATE = Rate(per_hour=2.0, cores=1.0, memory_gib=0.5)
IDLE_PART, BUSY_PART = Part(IDLE), Part(BUSY, "", "ann", "digits")
NOW = 1_700_000_000 // DAY_S * DAY_S + 12 * HOUR_S


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CostStore]:
    found = CostStore(tmp_path / "costs.db", days_kept=400)
    yield found
    found.close()


def place(hour: int, part: Part = IDLE_PART, deployment: str = "d") -> Place:
    return Place(hour, deployment, "digits", 1, part)


def amount(seconds: int = 10, cost: float = 0.5) -> Amount:
    return Amount(Spent(seconds * NS, 1, 2, 3, 4, 5), cost, 0.25)


def a_life() -> Life:
    counted = {IDLE_PART: Spent(7 * NS), BUSY_PART: Spent(NS, 3, 4)}
    return Life("d-0-1", "d", "digits", 1, 1.5, 9.0, 8.5, RATE, 10.0, 3 * NS, counted, 5, 6)


def test_bookings_add_up(store: CostStore):
    store.book({place(NOW): amount(), place(NOW, BUSY_PART): amount(4, 0.1)}, [], [])
    store.book({place(NOW): amount(2, 0.1)}, [], [])
    found = {row.part: each for row, each in store.amounts(NOW, NOW + HOUR_S)}
    assert found[IDLE_PART] == Amount(Spent(12 * NS, 2, 4, 6, 8, 10), 0.6, 0.5)
    assert found[BUSY_PART].spent.ns == 4 * NS
    assert store.amounts(NOW + HOUR_S, NOW + 2 * HOUR_S) == []
    assert store.by_hour(NOW, "d") == {NOW: pytest.approx(0.1 + 0.6 + 0.75)}
    assert store.by_hour(NOW, "other") == {}
    assert store.first_hour() == NOW


def test_a_life_survives_a_restart(store: CostStore, tmp_path: Path):
    store.book({}, [a_life()], [])
    again = CostStore(tmp_path / "costs.db")
    assert again.lives() == [a_life()]
    again.book({}, [], ["d-0-1"])
    assert again.lives() == []
    again.close()


def test_old_hours_become_days_and_older_ones_go(store: CostStore):
    old, ancient = NOW - HOURS_KEPT_S - 2 * DAY_S, NOW - 401 * DAY_S
    hours = [old + hour * HOUR_S for hour in range(5)]
    store.book({place(hour): amount() for hour in (*hours, NOW, ancient)}, [], [])
    for _ in range(2):  # a second time changes nothing
        store.retire(NOW)
        found = {row.hour: each for row, each in store.amounts(0, NOW + HOUR_S, hourly=True)}
        assert found == {
            old // DAY_S * DAY_S: Amount(Spent(50 * NS, 5, 10, 15, 20, 25), 2.5, 1.25),
            NOW: amount(),
        }
