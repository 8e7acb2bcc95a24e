"""What this gateway tells of its load, and what it hears of the workers: both every half second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable

from services.gateway.domain.admission import UNKNOWN_FLEET, Fleet
from tidegate import telemetry
from tidegate.protocol.presence import GatewayLoad, GatewayReport, ReplicaReport
from tidegate.store import Store, StoreUnavailable

log = telemetry.logger(__name__)


def fleets(reports: list[ReplicaReport]) -> dict[str, Fleet]:
    """The ready workers of each Deployment and their mean model time per request."""
    ready: dict[str, list[ReplicaReport]] = defaultdict(list)
    for report in reports:
        if report.state == "ready":
            ready[report.deployment].append(report)
    found = {}
    for name, workers in ready.items():
        times = [w.call_ms / max(w.batch_mean or 1.0, 1.0) for w in workers if w.call_ms is not None]
        found[name] = Fleet(len(workers), sum(times) / len(times) if times else None)
    return found


class Reporter:
    """Writes the gateway's heartbeat and keeps the last known fleets."""

    def __init__(
        self,
        store: Store,
        incarnation: str,
        interval_s: float,
        loads: Callable[[], dict[str, GatewayLoad]],
        show: Callable[[dict[str, GatewayLoad]], None],
    ) -> None:
        self._store = store
        self._incarnation = incarnation
        self._interval_s = interval_s
        self._loads = loads
        self._show = show
        self._fleets: dict[str, Fleet] = {}
        self._task: asyncio.Task[None] | None = None
        self.store_down = False

    def fleet(self, deployment: str) -> Fleet:
        """The workers of a Deployment as last heard of."""
        return self._fleets.get(deployment, UNKNOWN_FLEET)

    async def start(self) -> None:
        """Hear once, then go on in the background."""
        await self._round()
        self._task = asyncio.create_task(self._run(), name="reporter")

    async def stop(self) -> None:
        """Sign off, so that this gateway counts as gone and not as missing."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(StoreUnavailable):
            await self._store.forget_gateway(self._incarnation)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._round()

    async def _round(self) -> None:
        loads = self._loads()
        self._show(loads)
        try:
            await self._store.report_gateway(GatewayReport(self._incarnation, time.time(), loads))
            self._fleets = fleets(await self._store.replicas())
            self.store_down = False
        except StoreUnavailable as error:
            if not self.store_down:
                log.warning(
                    "the store is away; going on with what is known", extra={"problem": error.message}
                )
            self.store_down = True
