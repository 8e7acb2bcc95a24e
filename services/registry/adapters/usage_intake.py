"""Add usage reports from the broker to the database. Each report is added once and acked after the commit."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta

from prometheus_client import Counter

from services.registry.adapters.sql import usage
from services.registry.adapters.sql.database import RegistryDatabase
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import USAGE
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.kernel.protocol.usage import UsageReport
from tidegate.kernel.repeating_task import RepeatingTask

log = telemetry.logger(__name__)

TAKEN = Counter("tidegate_registry_usage_reports_total", "Reports of usage, by outcome.", ["what"])

PREFETCH = 50
RETRY_S = 1.0
# The time for which the id of a report is stored. Gateways do not resend a report after this time.
REMEMBER = timedelta(days=7)
FORGET_EVERY_S = 3600.0


class UsageIntake:
    """Consume the queue ``usage.v1``, and add each usage report to the database."""

    def __init__(self, amqp_url: str, database: RegistryDatabase) -> None:
        self.connection = Connection(amqp_url, "registry usage", self._setup)
        self._database = database
        self._deliveries: asyncio.Queue[tuple[Channel, Delivery]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._forget_loop = RepeatingTask("registry usage reports", self._forget_step)

    def start(self) -> None:
        """Start to connect and consume."""
        self.connection.start()
        self._task = asyncio.create_task(self._run(), name="registry usage")
        self._forget_loop.start()

    async def stop(self) -> None:
        """Stop consuming. The broker redelivers reports that are not committed."""
        await tasks.end(self._task)
        await self._forget_loop.stop()
        await self.connection.stop()

    async def _setup(self, channel: Channel) -> None:
        await channel.declare(USAGE)

        def on_delivery(delivery: Delivery) -> None:
            self._deliveries.put_nowait((channel, delivery))

        await channel.consume(USAGE, on_delivery, prefetch=PREFETCH)

    async def _run(self) -> None:
        while True:
            channel, delivery = await self._deliveries.get()
            if channel is not self.connection.channel and self.connection.channel is not None:
                continue  # the channel has closed, so the broker redelivers the report on the current channel
            await self._add(delivery)
            with contextlib.suppress(Unavailable):
                channel.ack(delivery.tag)

    async def _add(self, delivery: Delivery) -> None:
        try:
            report = UsageReport.from_json(bytes(delivery.body))
        except (ValueError, KeyError, TypeError) as error:
            log.error("a usage report cannot be read", extra={"problem": repr(error)})
            TAKEN.labels("unreadable").inc()
            return
        while True:
            try:
                async with self._database.write() as writer:
                    new = await usage.add(writer.connection, report, writer.now)
            except Unavailable as error:
                log.warning(
                    "a usage report cannot be stored yet; trying again", extra={"problem": error.message}
                )
                await asyncio.sleep(RETRY_S)
            except TidegateError as error:
                # Do not retry this report. It would fail again, and delay the next reports.
                _log_rejected(report, error)
                TAKEN.labels("refused").inc()
                return
            else:
                TAKEN.labels("added" if new else "again").inc()
                return

    async def _forget_step(self) -> float:
        try:
            async with self._database.write() as writer:
                await usage.forget_reports(writer.connection, writer.now - REMEMBER)
        except TidegateError as error:
            log.warning("old usage reports cannot be deleted; trying again", extra={"problem": error.message})
        return FORGET_EVERY_S


def _log_rejected(report: UsageReport, error: TidegateError) -> None:
    requests = sum(counts[0] for counts in report.counts.values())
    fields = {"incarnation": report.incarnation, "seq": report.seq, "requests": requests}
    log.error("usage is lost: the database refuses a report", extra=fields | {"problem": error.message})
