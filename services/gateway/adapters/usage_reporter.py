"""Count the usage of callers in memory, and report it to the registry over a durable queue."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable

from prometheus_client import Counter

from services.gateway.adapters.store.job_usage import JobUsageStore
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import USAGE
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.usage import ZERO, Subject, UsageReport, day_of

log = telemetry.logger(__name__)

LOST = Counter("tidegate_gateway_usage_lost_total", "Requests whose usage could not be reported.")

CONFIRM_S = 5.0
CONNECT_S = 2.0


class UsageReporter:
    """A counter of each caller's usage at each endpoint. It reports the usage every ``every_s`` seconds.

    A report is published again, unchanged, until the broker confirms it. A killed process loses the usage
    since its last report.
    """

    def __init__(self, amqp_url: str, incarnation: str, every_s: float, jobs: JobUsageStore) -> None:
        """``jobs``: the store's usage counts of jobs, which this process reports too.

        :attr:`on_callers` is called with the callers and endpoints of each report.
        """
        self.on_callers: Callable[[Iterable[tuple[str, str]]], None] | None = None
        self.connection = Connection(amqp_url, "gateway usage", _declare)
        self._incarnation = incarnation
        self._every_s = every_s
        self._jobs = jobs
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._sealed: UsageReport | None = None
        self._seq = 0
        self._waiting = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start reporting in the background."""
        self.connection.start()
        self._task = asyncio.create_task(self._run(), name="usage")

    async def stop(self) -> None:
        """Stop, and report the remaining usage if the broker is available."""
        await tasks.end(self._task)
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                while self._sealed or self._counts:
                    await self._report()
        lost = sum(counts[0] for counts in self._counts.values())
        lost += sum(counts[0] for counts in self._sealed.counts.values()) if self._sealed else 0
        if lost:
            LOST.inc(lost)
            log.error(
                "usage was lost: the broker did not answer when this process stopped",
                extra={"requests": lost},
            )
        await self.connection.stop()

    def counts(self, principal: str, endpoint: str) -> list[int]:
        """Return a caller's counts at an endpoint, in the order of ``COUNTS``.

        The calling code adds new usage by changing this list in place.
        """
        counts = self._counts.get((principal, endpoint))
        if counts is None:
            counts = self._counts[principal, endpoint] = [0] * len(ZERO)
        return counts

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self._report()
                await self._report_jobs()
                self._waiting = False
            except (Unavailable, TimeoutError) as error:
                if not self._waiting:
                    log.warning(
                        "usage could not be reported; the gateway tries again", extra={"problem": str(error)}
                    )
                self._waiting = True

    async def _report(self) -> None:
        if self._sealed is None:
            if not self._counts:
                return
            counts, self._counts = self._counts, {}
            if self.on_callers is not None:
                self.on_callers(counts)
            day = day_of(time.time())
            self._seq += 1
            subjects = {Subject(day, *subject): tuple(numbers) for subject, numbers in counts.items()}
            self._sealed = UsageReport(self._incarnation, self._seq, subjects)
        await self._send(self._sealed)
        self._sealed = None

    async def _report_jobs(self) -> None:
        report = await self._jobs.take()
        if report is not None:
            await self._send(report)
            await self._jobs.settle(report)

    async def _send(self, report: UsageReport) -> None:
        channel = await self.connection.wait_up(CONNECT_S)
        async with asyncio.timeout(CONFIRM_S):
            await channel.publish(report.to_json(), routing_key=USAGE.name, persistent=True, mandatory=True)


async def _declare(channel: Channel) -> None:
    await channel.declare(USAGE)
