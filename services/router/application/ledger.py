"""Keeps the conservation ledger of jobs: asks every source, again and again, and says what is missing."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable

from prometheus_client import Counter, Gauge

from services.router.domain import ledger
from services.router.domain.ledger import LOOKS, Discrepancy, LedgerReading, LedgerReport
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import jobs_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.jobs import LEVELS, STATES
from tidegate.kernel.store import Store, StoreUnavailable
from tidegate.kernel.store.jobs import JobStore

log = telemetry.logger(__name__)

# Workers report every half second: after this time their reports are newer than what was read before it.
REPORTS_S = 1.2

UNACCOUNTED = Gauge(
    "tidegate_jobs_unaccounted", "Jobs that are nowhere: 0 unless one is lost; NaN while a source is away."
)
JOBS = Gauge("tidegate_jobs", "Job records, by state.", ["state"])
LOST_SIGHT = Counter("tidegate_jobs_ledger_unknown_total", "Looks at which a source was away.", ["source"])


class SourceUnavailable(Exception):
    """A source cannot be asked now: its name, and why."""

    def __init__(self, source: str, why: str) -> None:
        super().__init__(why)
        self.source = source
        self.why = why


class Ledger:
    """One of the router's loops; ``statement`` is its last word. Only the router that leads keeps it."""

    def __init__(
        self, jobs: JobStore, store: Store, amqp_url: str, interval_s: float, *, leads: Callable[[], bool]
    ) -> None:
        self._jobs = jobs
        self._store = store
        self._interval_s = interval_s
        self._leads = leads
        self._connection = Connection(amqp_url, "router-ledger", self._no_setup)
        self._looks: list[Discrepancy] = []
        self._task: asyncio.Task[None] | None = None
        self.statement = LedgerReport(time.time(), None, {"ledger": "jobs have not been counted yet"})
        UNACCOUNTED.set(math.nan)

    def start(self) -> None:
        """Begin."""
        self._connection.start()
        self._task = asyncio.create_task(self._run(), name="ledger")

    async def stop(self) -> None:
        """End."""
        await tasks.end(self._task)
        await self._connection.stop()

    def take_lost(self) -> dict[str, bool]:
        """Deployments whose jobs have lost messages, and whether they have any message left; whoever takes
        this sees to it, and it is only said again after as many further looks.
        """
        found = ledger.lost_messages(self._looks)
        if found:
            self._looks = []
        return found

    async def _no_setup(self, _: Channel) -> None:
        return

    async def _run(self) -> None:
        while True:
            try:
                if not self._leads():
                    raise SourceUnavailable(
                        "leader", "this router does not lead; send the request to the leader"
                    )
                self._say(await self._look())
            except SourceUnavailable as away:
                self._say_unknown(away)
            except Exception as error:  # the loop must outlive whatever one look met
                log.exception("a look at the ledger failed")
                self._say_unknown(SourceUnavailable("ledger", f"the look failed: {error}"))
            await asyncio.sleep(self._interval_s)

    def _say(self, look: LedgerReading) -> None:
        missing = ledger.missing(look)
        self._looks = [*self._looks[1 - LOOKS :], missing]
        unaccounted = ledger.confirmed(self._looks)
        if unaccounted and unaccounted != self.statement.unaccounted:
            log.error("jobs are unaccounted for", extra={"missing": str(missing), "count": unaccounted})
        self.statement = LedgerReport(time.time(), unaccounted, {}, look, missing)
        UNACCOUNTED.set(self.statement.gauge)
        for state in STATES:
            JOBS.labels(state).set(look.counts.states.get(state, 0))

    def _say_unknown(self, away: SourceUnavailable) -> None:
        self._looks = []
        if away.source not in self.statement.away:
            log.warning("the ledger of jobs is unknown", extra={"source": away.source, "problem": away.why})
        if away.source == "leader":
            JOBS.clear()  # the leader tells them
        else:
            LOST_SIGHT.labels(away.source).inc()
        self.statement = LedgerReport(time.time(), None, {away.source: away.why})
        UNACCOUNTED.set(self.statement.gauge)

    async def _look(self) -> LedgerReading:
        """Ask all sources, in the order that :mod:`services.router.domain.ledger` needs."""
        try:
            before = await self._jobs.counts()
            ready = await self._ready(
                name for name, load in before.deployments.items() if load.waiting + load.running
            )
            await asyncio.sleep(REPORTS_S)
            held = await self._held()
            counts = await self._jobs.counts()
        except StoreUnavailable as error:
            raise SourceUnavailable("records", error.message) from None
        return LedgerReading(before.ledger.get("accepted", 0), counts, ready, held)

    async def _ready(self, deployments: Iterable[str]) -> dict[str, int]:
        channel = self._connection.channel
        if channel is None:
            raise SourceUnavailable("broker", self._connection.problem or "not connected")
        try:
            return {
                name: sum([await channel.depth(jobs_queue(name, level)) for level in LEVELS])
                for name in deployments
            }
        except Unavailable as error:
            raise SourceUnavailable("broker", error.message) from None

    async def _held(self) -> dict[str, int]:
        try:
            reports, view = await asyncio.gather(self._store.replicas(), self._store.gateways())
        except StoreUnavailable as error:
            raise SourceUnavailable("workers", error.message) from None
        if view.missing:
            raise SourceUnavailable("gateways", f"no report from {', '.join(view.missing)}")
        held: dict[str, int] = {}
        for report in reports:
            held[report.deployment] = held.get(report.deployment, 0) + report.jobs
        return held
