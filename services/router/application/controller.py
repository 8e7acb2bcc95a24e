"""Compile the route table from the desired state and the workers' reports, and publish it.

Only the leader compiles and publishes. The other routers read the published table.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Set

import orjson
from prometheus_client import Counter, Gauge

from services.router.adapters.registry_cache import RegistryCache
from services.router.adapters.table_revision import TableRevision
from services.router.application.leadership import Leadership
from services.router.application.queue_declarer import QueueDeclarer
from services.router.domain import table as compiler
from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import EVENTS, REGISTRY_CHANGED, events_queue
from tidegate.kernel.protocol.models import DesiredState
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

PUBLISHED = Counter("tidegate_router_tables_total", "Route tables published.")
ENDPOINTS = Gauge("tidegate_router_endpoints", "Endpoints in the route table.")


class RouteController:
    """One of the router's loops. It updates the route table in the store."""

    def __init__(
        self,
        store: Store,
        registry: RegistryCache,
        revision: TableRevision,
        leadership: Leadership,
        amqp_url: str,
        incarnation: str,
        *,
        interval_s: float,
        relist_s: float,
    ) -> None:
        # The ids of rollouts that the router has rolled back, but whose rollback is not stored in the
        # registry yet. Their canaries get no traffic.
        self.condemned: Set[str] = frozenset()
        self._store = store
        self._registry = registry
        self._revision = revision
        self._leadership = leadership
        self._interval_s = interval_s
        self._relist_s = relist_s
        self._events = events_queue("router", incarnation)
        self._loop = RepeatingTask("controller", self._step, retry_s=interval_s)
        leadership.on_change(self._loop.wake)
        self._relist = True
        self._listed_at = float("-inf")
        self._reports: list[ReplicaReport] = []
        self._learned: dict[str, object] = {}
        self._queues = QueueDeclarer()
        self._last: compiler.Table = {}
        self.table: compiler.Table | None = None
        self.store_problem: str | None = "The store has not been read yet."
        self.connection = Connection(amqp_url, "router-events", self._on_setup, on_up=self._queues.forget)

    def start(self) -> None:
        """Load the last desired state and start the loop."""
        self._registry.load()
        self.connection.start()
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop. The last table stays published."""
        await self._loop.stop()
        await self.connection.stop()
        await self._registry.close()

    @property
    def desired(self) -> DesiredState | None:
        """Return the last desired state that was read; None before the first read."""
        return self._registry.desired

    def relist(self) -> None:
        """Read the registry now instead of at the next interval."""
        self._relist = True
        self._loop.wake()

    def problem(self) -> str | None:
        """Return why this router has no route table; None if it has one."""
        if self.table is None:
            if not self._leadership.leads:
                return self.store_problem or self._leadership.why_not
            return self._registry.problem or self.store_problem or "No table was compiled yet."
        return None

    async def _on_setup(self, channel: Channel) -> None:
        await channel.declare(EVENTS)
        await channel.declare(self._events)
        await channel.bind(self._events, EVENTS, REGISTRY_CHANGED)
        await channel.consume(self._events, self._on_event, prefetch=100, no_ack=True)

    async def _on_event(self, _: Delivery) -> None:
        self.relist()

    async def _step(self) -> float:
        now = asyncio.get_running_loop().time()
        if self._relist or now - self._listed_at >= self._relist_s:
            self._relist, self._listed_at = False, now
            await self._registry.refresh()
        await self._round()
        return self._interval_s

    async def _round(self) -> None:
        if not self._leadership.leads:
            await self._follow()
            return
        epoch = self._leadership.epoch
        desired = self._registry.desired
        if desired is None:
            return
        try:
            self._reports = await self._store.replicas()
            self.store_problem = None
        except StoreUnavailable as error:
            self.store_problem = error.message  # continue with the last reports
        ready = compiler.ready_counts(self._reports)
        self._learned |= {r.deployment: r.signature for r in self._reports if r.signature}
        table = compiler.build_table(
            desired, ready, self._learned, compiler.failing(self._reports), frozenset(self.condemned)
        )
        await self._queues.declare(compiler.queues(table), self.connection)
        await self._publish(table, epoch)
        for endpoint in compiler.settled(desired, ready):
            await self._registry.settle(endpoint)
            self._relist = True

    async def _follow(self) -> None:
        """Read the table that the leader has published."""
        try:
            raw = await self._store.read_routes()
            self.store_problem = None
        except StoreUnavailable as error:
            self.store_problem = error.message
            return
        if raw is not None:
            self.table = orjson.loads(raw)
            ENDPOINTS.set(len(self.table["endpoints"]))

    async def _publish(self, table: compiler.Table, epoch: int) -> None:
        if epoch != self._revision.epoch:
            self._revision.begin(epoch)
            self._last = {}
        if table != self._last:
            self._revision.advance()
            self._last = table
        self.table = {"epoch": self._revision.text, "n": self._revision.n, **table}
        ENDPOINTS.set(len(table["endpoints"]))
        raw = orjson.dumps(self.table)
        with contextlib.suppress(StoreUnavailable):
            # Compare with the table in the store, because the store may have lost the last published one.
            if await self._store.read_routes() != raw:
                if (newer := await self._store.publish_routes(raw)) is not None:
                    log.warning(
                        "another router has published a newer table", extra={"epoch": newer, "ours": epoch}
                    )
                    self._leadership.overtaken(newer)
                    return
                PUBLISHED.inc()
                log.info(
                    "route table published",
                    extra={"n": self._revision.n, "endpoints": len(table["endpoints"])},
                )
