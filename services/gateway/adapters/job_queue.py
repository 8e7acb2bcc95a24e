"""Publish persistent job messages. The broker confirms each message before the caller gets a 202."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.gateway.adapters.event_publisher import publish_cancels
from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Refused, Unroutable
from tidegate.kernel.broker.topology import CANCELS, Queue, jobs_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.jobs import Level

log = telemetry.logger(__name__)

# This is longer than a restart of the broker takes, so a restart causes no errors for callers.
CONFIRM_TIMEOUT_S = 10.0
RETRY_S = 0.05


class JobQueue:
    """A publisher of job messages, with its own connection.

    :meth:`publish` waits for the broker's confirm. To publish many jobs, call it in concurrent tasks.
    """

    def __init__(self, amqp_url: str, timeout_s: float = CONFIRM_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._declared: dict[str, asyncio.Task[None]] = {}
        self.connection = Connection(amqp_url, "gateway-jobs", self._on_setup, fast=True)

    def start(self) -> None:
        """Connect."""
        self.connection.start()

    async def stop(self) -> None:
        """Disconnect."""
        await self.connection.stop()

    async def ready(self) -> None:
        """Wait for the connection. Raises ``Unavailable`` if it is not up in time."""
        if self.connection.channel is None:
            await self.connection.wait_up(self._timeout_s)

    async def publish(self, deployment: str, level: Level, frame: Buffer) -> None:
        """Publish a job's message, and return when the broker has it on disk.

        If the connection is lost before the confirm, the message is published again. Then two messages can
        exist, but workers accept the job only once.

        Raise ``Unavailable`` if the broker refuses the message or does not confirm it in time.
        """
        queue = jobs_queue(deployment, level)
        body = envelope.pack(envelope.REQUESTS, [frame])
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._timeout_s
        while True:
            channel = self.connection.channel or await self.connection.wait_up(
                max(0.0, give_up_at - loop.time())
            )
            try:
                await self._declare(channel, queue)
                await channel.publish(body, routing_key=queue.name, mandatory=True, persistent=True)
                return
            except Unroutable:
                self._declared.pop(queue.name, None)  # the queue was deleted: declare it again
            except Refused:
                raise
            except Unavailable as error:
                log.info(
                    "the connection to the broker was lost; publishing a job again",
                    extra={"problem": error.message},
                )
            if loop.time() > give_up_at:
                raise Unavailable(
                    f"the broker did not confirm the job within {self._timeout_s:g} s: send it again",
                    retry_after_s=1.0,
                )
            await asyncio.sleep(RETRY_S)

    async def cancel(self, ids: Sequence[bytes]) -> None:
        """Publish the ids of cancelled jobs to all workers. Without a connection, nothing is published."""
        await publish_cancels(self.connection.channel, ids)

    async def _on_setup(self, channel: Channel) -> None:
        self._declared.clear()
        await channel.declare(CANCELS)

    async def _declare(self, channel: Channel, queue: Queue) -> None:
        """Declare a queue once per connection, even if several tasks publish to it at the same time."""
        known = self._declared.get(queue.name)
        if known is None or (known.done() and known.exception() is not None):
            known = self._declared[queue.name] = asyncio.create_task(channel.declare(queue))
        if not known.done():
            await asyncio.shield(known)
