"""What this gateway tells of its load, and what it hears of the workers: both every half second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from services.gateway.domain.admission import UNKNOWN_REPLICAS, ReplicaFleet
from services.gateway.domain.replica_fault import ReplicaFault, trouble
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport, GatewayView, ReplicaReport
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)


STATUS_EVERY_S = 2.0


def fleets(
    reports: list[ReplicaReport],
    elsewhere: dict[str, int] | None = None,
    statuses: dict[str, dict[str, Any]] | None = None,
    now: float = 0.0,
) -> dict[str, ReplicaFleet]:
    """What is known of each Deployment's workers; ``now`` is seconds since the epoch."""
    ready: dict[str, list[ReplicaReport]] = defaultdict(list)
    others: dict[str, list[ReplicaReport]] = defaultdict(list)
    for report in reports:
        (ready if report.state == "ready" else others)[report.deployment].append(report)
    elsewhere, statuses = elsewhere or {}, statuses or {}
    found = {}
    for name in ready.keys() | others.keys() | elsewhere.keys() | statuses.keys():
        measured = [w for w in ready[name] if w.call_ms is not None]
        start_ms, wrong = None, ReplicaFault()
        if not ready[name]:
            status = statuses.get(name, {})
            wrong = trouble(others[name], status)
            start_ms = None if wrong.fault else _start_ms(status, now)
        found[name] = ReplicaFleet(
            len(ready[name]),
            _mean([(w.call_ms or 0.0) / max(w.batch_mean or 1.0, 1.0) for w in measured]),
            _mean([(w.call_ms or 0.0) / w.parallel for w in measured]),
            elsewhere.get(name, 0),
            start_ms,
            *wrong,
        )
    return found


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _start_ms(status: dict[str, Any], now: float) -> float | None:
    """Return the ms until a replica is ready, by the slowest of the last cold starts; None: not known."""
    past: list[float] = [start["total_ms"] for start in status.get("cold_starts", ())[-3:]]
    if not past:
        return None
    begun = [r["launched_at"] for r in status.get("replicas", ()) if r.get("state") == "starting"]
    since_ms = max(0.0, now - min(begun)) * 1e3 if begun else 0.0
    return max(max(past) - since_ms, 0.0)


def outstanding_elsewhere(view: GatewayView, incarnation: str) -> dict[str, int]:
    """What the other gateways have outstanding, by Deployment."""
    found: dict[str, int] = defaultdict(int)
    for report in view.reports:
        if report.incarnation != incarnation:
            for name, load in report.deployments.items():
                found[name] += load.outstanding
    return dict(found)


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
        return self._fleets.get(deployment, UNKNOWN_REPLICAS)

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
