"""Job messages out: persistent, each confirmed by its quorum queue before anybody is told of it."""

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

# A broker that restarts is back within this time; nobody has to hear of it.
PATIENCE_S = 10.0
AGAIN_S = 0.05


class JobQueue:
    """The publishing side of the job queues, on a connection of its own.

    Confirms are awaited concurrently: call :meth:`publish` from as many tasks as there are jobs.
    """

    def __init__(self, amqp_url: str, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._declared: dict[str, asyncio.Task[None]] = {}
        self.connection = Connection(amqp_url, "gateway-jobs", self._on_setup)

    def start(self) -> None:
        """Connect."""
        self.connection.start()

    async def stop(self) -> None:
        """Disconnect."""
        await self.connection.stop()

    async def ready(self) -> None:
        """Return while there is a connection; raises ``Unavailable`` when it does not come back in time."""
        if self.connection.channel is None:
            await self.connection.wait_up(self._patience_s)

    async def publish(self, deployment: str, level: Level, frame: Buffer) -> None:
        """Return once the broker has the message of one job on disk. Raises ``Unavailable``.

        It is sent again when the broker was lost before it confirmed, so there may be two messages; a
        worker takes a job once.
        """
        queue = jobs_queue(deployment, level)
        body = envelope.pack(envelope.REQUESTS, [frame])
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._patience_s
        while True:
            channel = self.connection.channel or await self.connection.wait_up(
                max(0.0, give_up_at - loop.time())
            )
            try:
                await self._declare(channel, queue)
                await channel.publish(body, routing_key=queue.name, mandatory=True, persistent=True)
                return
            except Unroutable:
                self._declared.pop(queue.name, None)  # somebody deleted the queue
            except Refused:
                raise
            except Unavailable as error:
                log.info("a job is sent again: the broker was lost", extra={"problem": error.message})
            if loop.time() > give_up_at:
                raise Unavailable("the broker did not take the job in time", retry_after_s=1.0)
            await asyncio.sleep(AGAIN_S)

    async def cancel(self, ids: Sequence[bytes]) -> None:
        """Tell every worker, best effort, that nobody wants these any more."""
        await publish_cancels(self.connection.channel, ids)

    async def _on_setup(self, channel: Channel) -> None:
        self._declared.clear()
        await channel.declare(CANCELS)

    async def _declare(self, channel: Channel, queue: Queue) -> None:
        """Once for each queue and session, however many publish to it at the same time."""
        known = self._declared.get(queue.name)
        if known is None or (known.done() and known.exception() is not None):
            known = self._declared[queue.name] = asyncio.create_task(channel.declare(queue))
        if not known.done():
            await asyncio.shield(known)
