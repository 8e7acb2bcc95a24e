"""Read the cost rates of Deployments, which the autoscaler writes to the store."""

from __future__ import annotations

from services.gateway.domain.request_costs import RequestCosts
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import Store, StoreUnavailable

EVERY_S = 2.0


class CostFactsReader:
    """Read the cost rates again and again. If the store does not answer, the last rates stay in use."""

    def __init__(self, store: Store, costs: RequestCosts) -> None:
        self._store = store
        self._costs = costs
        self._loop = RepeatingTask("cost facts", self._step, retry_s=EVERY_S)

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop."""
        await self._loop.stop()

    async def _step(self) -> float:
        try:
            facts = await self._store.cost_facts()
        except StoreUnavailable:
            return EVERY_S  # do not log it: the heartbeat logs the outage
        if facts is not None:
            self._costs.replace(facts)
        return EVERY_S
