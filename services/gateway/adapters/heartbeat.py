"""What this gateway tells of its load, and what it hears of the workers: both every half second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from services.gateway.domain.replica_fleet import (
    UNKNOWN_FLEET,
    ReplicaFleet,
    fleets,
    outstanding_elsewhere,
)
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)


STATUS_EVERY_S = 2.0


class Heartbeat:
    """Writes the gateway's heartbeat and keeps the last known fleets."""

    def __init__(
        self,
        store: Store,
        incarnation: str,
        interval_s: float,
        loads: Callable[[], dict[str, GatewayLoad]],
        show: Callable[[dict[str, GatewayLoad]], None],
        heard: Callable[[dict[str, ReplicaFleet]], None] = lambda _: None,
    ) -> None:
        """``heard`` is called with what is known of the workers, after each round that read it."""
        self._store = store
        self._incarnation = incarnation
        self._interval_s = interval_s
        self._loads = loads
        self._show = show
        self._heard = heard
        self._fleets: dict[str, ReplicaFleet] = {}
        self._statuses: dict[str, dict[str, Any]] = {}
        self._statuses_at = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self.store_down = False
        self.gateways = 1

    def fleet(self, deployment: str) -> ReplicaFleet:
        """The workers of a Deployment as last heard of."""
        return self._fleets.get(deployment, UNKNOWN_FLEET)

    async def start(self) -> None:
        """Hear once, then go on in the background."""
        await self._round()
        self._task = asyncio.create_task(self._run(), name="reporter")

    async def stop(self) -> None:
        """Sign off, so that this gateway counts as gone and not as missing."""
        await tasks.end(self._task)
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
            if time.monotonic() - self._statuses_at > STATUS_EVERY_S or self._in_vain(loads):
                self._statuses, self._statuses_at = await self._store.statuses(), time.monotonic()
            view = await self._store.gateways()
            self.gateways = max(1, len(view.reports))
            elsewhere = outstanding_elsewhere(view, self._incarnation)
            self._fleets = fleets(await self._store.replicas(), elsewhere, self._statuses, time.time())
            self.store_down = False
            self._heard(self._fleets)
        except StoreUnavailable as error:
            if not self.store_down:
                log.warning(
                    "the store is away; going on with what is known", extra={"problem": error.message}
                )
            self.store_down = True

    def _in_vain(self, loads: dict[str, GatewayLoad]) -> bool:
        """Return True if requests wait and nobody is ready: whether a start failed is wanted at once."""
        return any(load.outstanding and not self.fleet(name).ready for name, load in loads.items())
