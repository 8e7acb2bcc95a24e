"""Publish the traffic counts and the active callers of each endpoint, every two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from tidegate.kernel.protocol.traffic import EndpointTraffic, TrafficReport
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import Store, StoreUnavailable

EVERY_S = 2.0


class TrafficPublisher:
    """A background loop that publishes the counts. The router reads them."""

    def __init__(
        self, store: Store, incarnation: str, counts: Callable[[], dict[str, EndpointTraffic]]
    ) -> None:
        self._store = store
        self._incarnation = incarnation
        self._counts = counts
        self._callers: dict[str, set[str]] = {}
        self._loop = RepeatingTask("traffic", self._step, retry_s=EVERY_S)

    def start(self) -> None:
        """Start the loop."""
        self._loop.start(after_s=EVERY_S)

    async def stop(self) -> None:
        """Stop the loop, and publish the last counts. The store keeps them until they expire."""
        await self._loop.stop()
        await self._publish()

    def seen(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Record which callers called which endpoints.

        ``pairs``: (caller, endpoint), from a usage report.
        """
        for caller, endpoint in pairs:
            self._callers.setdefault(endpoint, set()).add(caller)

    async def _step(self) -> float:
        await self._publish()
        return EVERY_S

    async def _publish(self) -> None:
        callers, self._callers = self._callers, {}
        now = time.time()
        try:
            await self._store.report_traffic(TrafficReport(self._incarnation, now, self._counts()), callers)
        except StoreUnavailable:  # the next round publishes these callers; the heartbeat logs the outage
            self.seen((caller, endpoint) for endpoint, each in callers.items() for caller in each)
