"""Test the autoscaler's durable state on a real SQLite file."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from services.autoscaler.adapters.history.decision_store import COLD_STARTS_KEPT, DecisionStore
from services.autoscaler.domain.snapshot import Decision, LocalOverride
from tidegate.kernel.errors import Unavailable


def decision(number: int, deployment: str = "digits-v1") -> Decision:
    return Decision(float(number), deployment, "demand", "why", 0, number, {"demand": None}, [])


def test_generations_only_rise_and_outlive_the_process(tmp_path: Path):
    path = tmp_path / "data" / "autoscaler.db"
    decision_store = DecisionStore(path)
    decision_store.save_generation("digits-v1", 0, 3)
    decision_store.save_generation("digits-v1", 0, 2)
    decision_store.save_generation("digits-v1", 1, 1)
    decision_store.close()
    again = DecisionStore(path)
    assert again.generations() == {("digits-v1", 0): 3, ("digits-v1", 1): 1}
    again.close()


def test_decisions_are_bounded_and_newest_first(tmp_path: Path):
    decision_store = DecisionStore(tmp_path / "autoscaler.db", decisions_kept=5)
    for number in range(8):
        decision_store.add_decisions([decision(number), decision(number, "other-v1")])
    found = decision_store.decisions(None, 100)
    assert len(found) == 5
    assert [d["after"] for d in decision_store.decisions("digits-v1", 2)] == [7, 6]
    assert found[0]["inputs"] == {"demand": None}
    decision_store.close()


def test_cold_starts_are_bounded_per_deployment(tmp_path: Path):
    decision_store = DecisionStore(tmp_path / "autoscaler.db")
    decision_store.add_cold_start("other-v1", {"total_ms": 1.0})
    for number in range(COLD_STARTS_KEPT + 5):
        decision_store.add_cold_start("digits-v1", {"total_ms": float(number)})
    found = decision_store.cold_starts()
    assert len(found["digits-v1"]) == COLD_STARTS_KEPT
    assert found["digits-v1"][0]["total_ms"] == COLD_STARTS_KEPT + 4
    assert len(found["other-v1"]) == 1
    decision_store.close()


def test_overrides_are_replaced_and_dropped(tmp_path: Path):
    decision_store = DecisionStore(tmp_path / "autoscaler.db")
    decision_store.save_override("digits-v1", LocalOverride(3, 12.5))
    decision_store.save_override("digits-v1", LocalOverride(None, None))
    assert decision_store.overrides() == {"digits-v1": LocalOverride(None, None)}
    decision_store.drop_override("digits-v1")
    assert decision_store.overrides() == {}
    decision_store.close()


def test_a_file_that_is_in_another_ones_hands_is_unavailable_and_not_a_crash(tmp_path: Path):
    decision_store = DecisionStore(tmp_path / "autoscaler.db", timeout_s=0.05)
    other = sqlite3.connect(tmp_path / "autoscaler.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Unavailable, match="locked"):
        decision_store.save_generation("digits-v1", 0, 1)
    other.execute("ROLLBACK")
    other.close()
    decision_store.save_generation("digits-v1", 0, 1)
    decision_store.close()
