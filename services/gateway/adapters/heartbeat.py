"""Publish the gateway's load and read the replicas' reports, both every half second."""

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
    loads_elsewhere,
)
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport, VariantCounts
from tidegate.kernel.protocol.shadow import ShadowCounts
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

STATUS_EVERY_S = 2.0


class Heartbeat:
    """Write the gateway's heartbeat to the store, and cache the last known replicas of each Deployment."""

    def __init__(
        self,
        store: Store,
        incarnation: str,
        interval_s: float,
        loads: Callable[[], dict[str, GatewayLoad]],
        publish_metrics: Callable[[dict[str, GatewayLoad]], None],
        on_fleets: Callable[[dict[str, ReplicaFleet]], None] = lambda _: None,
        traffic: Callable[[], dict[str, dict[str, VariantCounts]]] = dict,
        shadows: Callable[[], dict[str, ShadowCounts]] = dict,
    ) -> None:
        """``on_fleets``: called after each successful round, with the replicas of all Deployments.

        ``traffic``: returns the request counts of the Deployments of each endpoint with an active rollout or
        experiment. ``shadows``: returns the counts of shadow traffic.
        """
        self._store = store
        self._incarnation = incarnation
        self._interval_s = interval_s
        self._loads = loads
        self._publish_metrics = publish_metrics
        self._on_fleets = on_fleets
        self._traffic = traffic
        self._shadows = shadows
        self._fleets: dict[str, ReplicaFleet] = {}
        self._statuses: dict[str, dict[str, Any]] = {}
        self._statuses_at = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self.store_down = False
        self.gateways = 1

    def fleet(self, deployment: str) -> ReplicaFleet:
        """Return the replicas of a Deployment as last reported."""
        return self._fleets.get(deployment, UNKNOWN_FLEET)

    async def start(self) -> None:
        """Publish the load and read the reports once. Then repeat both in the background."""
        await self._round()
        self._task = asyncio.create_task(self._run(), name="heartbeat")

    async def stop(self) -> None:
        """Remove the heartbeat, so that other services count this gateway as stopped and not as missing."""
        await tasks.end(self._task)
        with contextlib.suppress(StoreUnavailable):
            await self._store.forget_gateway(self._incarnation)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._round()

    async def _round(self) -> None:
        loads = self._loads()
        self._publish_metrics(loads)
        try:
            await self._store.report_gateway(
                GatewayReport(self._incarnation, time.time(), loads, self._traffic(), self._shadows())
            )
            if time.monotonic() - self._statuses_at > STATUS_EVERY_S or self._waits_for_replica(loads):
                self._statuses, self._statuses_at = await self._store.statuses(), time.monotonic()
            view = await self._store.gateways()
            self.gateways = max(1, len(view.reports))
            elsewhere = loads_elsewhere(view, self._incarnation)
            self._fleets = fleets(await self._store.replicas(), elsewhere, self._statuses, time.time())
            self.store_down = False
            self._on_fleets(self._fleets)
        except StoreUnavailable as error:
            if not self.store_down:
                log.warning(
                    "cannot reach the store; the gateway uses the last known state",
                    extra={"problem": error.message},
                )
            self.store_down = True

    def _waits_for_replica(self, loads: dict[str, GatewayLoad]) -> bool:
        """Return True if requests wait for a Deployment without a ready replica.

        If True, the current round also reads the statuses of the Deployments. A status shows whether the
        start of a replica failed.
        """
        return any(load.outstanding and not self.fleet(name).ready for name, load in loads.items())
