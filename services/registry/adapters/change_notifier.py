"""Publish notifications about changes of the desired state.

A lost notification only causes a delay, because the other services also read the whole desired state every
few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from prometheus_client import Counter

from services.registry.domain.desired_state import ChangeNotification
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import EVENTS, REGISTRY_CHANGED
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

PUBLISHED = Counter("tidegate_registry_events_published_total", "Change events that the broker confirmed.")
LOST = Counter("tidegate_registry_events_lost_total", "Change events that could not be published.")

MAX_QUEUED = 1_000
PUBLISH_TIMEOUT_S = 5.0


class ChangeNotifier:
    """A publisher of notifications. It works in the background, so a slow broker never delays a write."""

    def __init__(self, amqp_url: str) -> None:
        self.connection = Connection(amqp_url, "registry events", _declare)
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(MAX_QUEUED)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to connect and to publish."""
        self.connection.start()
        self._task = asyncio.create_task(self._run(), name="registry change notifier")

    async def stop(self) -> None:
        """Publish the queued notifications if the broker is connected. Then disconnect."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0 if self.connection.channel else 0):
                await self._queue.join()
        await tasks.end(self._task)
        await self.connection.stop()

    def notify(self, revision: int, notifications: Sequence[ChangeNotification]) -> None:
        """Queue one notification for each changed object, without waiting."""
        for notification in notifications:
            body = json.dumps({"revision": revision, **asdict(notification)}).encode()
            try:
                self._queue.put_nowait(body)
            except asyncio.QueueFull:
                LOST.inc()

    async def _run(self) -> None:
        while True:
            body = await self._queue.get()
            try:
                await self._publish(body)
            finally:
                self._queue.task_done()

    async def _publish(self, body: bytes) -> None:
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                if self.connection.channel is None:
                    raise Unavailable(self.connection.problem or "RabbitMQ is not connected.")
                await self.connection.channel.publish(
                    body, exchange=EVENTS.name, routing_key=REGISTRY_CHANGED
                )
        except (Unavailable, TimeoutError) as error:
            LOST.inc()
            log.warning("change event lost", extra={"problem": str(error), "event": body.decode()})
        else:
            PUBLISHED.inc()


async def _declare(channel: Channel) -> None:
    await channel.declare(EVENTS)
