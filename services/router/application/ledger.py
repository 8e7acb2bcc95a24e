"""Keep the ledger of jobs: read every source regularly, and report lost jobs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable

from prometheus_client import Counter, Gauge

from services.router.domain import ledger
from services.router.domain.ledger import CONFIRMATIONS, Discrepancy, LedgerReading, LedgerReport
from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import jobs_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.jobs import LEVELS, STATES
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import Store, StoreUnavailable
from tidegate.kernel.store.jobs import JobStore

log = telemetry.logger(__name__)

# Seconds to wait before the workers' reports are read. Workers report every half second. So the reports are
# newer than the sources that were read before this wait.
REPORTS_S = 1.2

UNACCOUNTED = Gauge("tidegate_jobs_unaccounted", "Jobs that are lost; NaN while a source does not answer.")
JOBS = Gauge("tidegate_jobs", "Job records, by state.", ["state"])
UNKNOWN = Counter(
    "tidegate_jobs_ledger_unknown_total", "Readings in which a source did not answer.", ["source"]
)


class SourceUnavailable(Exception):
    """The error that a source of the ledger cannot be read.

    ``source``: the name of the source. ``problem``: the reason.
    """

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(problem)
        self.source = source
        self.problem = problem


class Ledger:
    """One of the router's loops. Only the leader counts the jobs. ``report`` is the latest result."""

    def __init__(
        self, jobs: JobStore, store: Store, amqp_url: str, interval_s: float, *, leads: Callable[[], bool]
    ) -> None:
        self._jobs = jobs
        self._store = store
        self._interval_s = interval_s
        self._leads = leads
        self._connection = Connection(amqp_url, "router-ledger", self._no_setup)
        self._missing: list[Discrepancy] = []
        self._loop = RepeatingTask("ledger", self._step)
        self.report = LedgerReport(time.time(), None, {"ledger": "jobs have not been counted yet"})
        UNACCOUNTED.set(math.nan)

    def start(self) -> None:
        """Start the loop."""
        self._connection.start()
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop and disconnect."""
        await self._loop.stop()
        await self._connection.stop()

    def take_lost(self) -> dict[str, bool]:
        """Return the Deployments that have lost messages of jobs.

        The value of a Deployment is True if it still has some messages, and False if it has none. The calling
        code must queue the jobs again. A later call returns a Deployment again only if several new readings
        confirm a loss.
        """
        lost = ledger.lost_messages(self._missing)
        if lost:
            self._missing = []
        return lost

    async def _no_setup(self, _: Channel) -> None:
        return

    async def _step(self) -> float:
        try:
            if not self._leads():
                problem = "this router does not lead; send the request to the leader"
                raise SourceUnavailable("leader", problem)
            self._publish(await self._read())
        except SourceUnavailable as error:
            self._publish_unknown(error)
        except Exception as error:
            log.exception("a reading of the ledger failed")
            self._publish_unknown(SourceUnavailable("ledger", f"the reading failed: {error}"))
        return self._interval_s

    def _publish(self, reading: LedgerReading) -> None:
        missing = ledger.discrepancy(reading)
        self._missing = [*self._missing[1 - CONFIRMATIONS :], missing]
        unaccounted = ledger.confirmed(self._missing)
        if unaccounted and unaccounted != self.report.unaccounted:
            log.error("jobs are unaccounted for", extra={"missing": str(missing), "count": unaccounted})
        self.report = LedgerReport(time.time(), unaccounted, {}, reading, missing)
        UNACCOUNTED.set(self.report.gauge)
        for state in STATES:
            JOBS.labels(state).set(reading.counts.states.get(state, 0))

    def _publish_unknown(self, error: SourceUnavailable) -> None:
        self._missing = []
        if error.source not in self.report.away:
            log.warning(
                "the jobs could not be counted", extra={"source": error.source, "problem": error.problem}
            )
        if error.source == "leader":
            JOBS.clear()  # this router does not lead: only the leader publishes these numbers
        else:
            UNKNOWN.labels(error.source).inc()
        self.report = LedgerReport(time.time(), None, {error.source: error.problem})
        UNACCOUNTED.set(self.report.gauge)

    async def _read(self) -> LedgerReading:
        """Read all sources, in the order that :mod:`services.router.domain.ledger` needs."""
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
