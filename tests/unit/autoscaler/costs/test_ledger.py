"""The ledger survives errors, because budgets depend on it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.autoscaler.adapters.history.cost_store import CostStore
from services.autoscaler.application import cost_ledger
from services.autoscaler.application.cost_ledger import CostLedger
from tests.conftest import PATIENCE_S
from tidegate.kernel.price_file import PriceFile
from tidegate.kernel.protocol.replica_time import ReplicaTime

pytestmark = pytest.mark.unit


class UnreadableOnce:
    """A store whose first report cannot be read."""

    def __init__(self) -> None:
        self.calls = 0
        self.read_again = asyncio.Event()

    async def times(self) -> dict[str, ReplicaTime]:
        self.calls += 1
        if self.calls > 1:
            self.read_again.set()
        raise KeyError("parts")


async def test_an_unreadable_report_does_not_end_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_ledger, "BOOK_EVERY_S", 0.01)
    monkeypatch.setattr(cost_ledger, "RETRY_S", 0.0)
    store: Any = UnreadableOnce()
    costs = CostStore(tmp_path / "costs.db")
    ledger = CostLedger(store, costs, PriceFile(None), list)
    ledger.take_over(None)
    running = asyncio.create_task(ledger.run())
    try:
        await asyncio.wait_for(store.read_again.wait(), PATIENCE_S)
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        costs.close()
