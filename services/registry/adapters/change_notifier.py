"""Tells others that the intention has changed. Hints: whoever misses one re-lists within seconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from prometheus_client import Counter

from services.registry.domain.desired_state import ChangeNotification
from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import EVENTS, REGISTRY_CHANGED
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

PUBLISHED = Counter("tidegate_registry_events_published_total", "Change events that the broker took.")
LOST = Counter("tidegate_registry_events_lost_total", "Change events that could not be published.")

WAITING = 1_000
PUBLISH_TIMEOUT_S = 5.0


class ChangeNotifier:
    """Publishes in the background, so that a slow or absent broker never holds up a write."""

    def __init__(self, amqp_url: str) -> None:
        self.connection = Connection(amqp_url, "registry events", _declare)
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(WAITING)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin connecting and publishing."""
        self.connection.start()
        self._task = asyncio.create_task(self._run(), name="registry change notifier")

    async def stop(self) -> None:
        """Publish what waits, if the broker is there, and close."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0 if self.connection.channel else 0):
                await self._waiting.join()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.connection.stop()

    def notify(self, revision: int, notifications: Sequence[ChangeNotification]) -> None:
        """Queue one event per changed object; returns at once."""
        for notification in notifications:
            body = json.dumps({"revision": revision, **asdict(notification)}).encode()
            try:
                self._waiting.put_nowait(body)
            except asyncio.QueueFull:
                LOST.inc()

    async def _run(self) -> None:
        while True:
            body = await self._waiting.get()
            try:
                await self._publish(body)
            finally:
                self._waiting.task_done()

    async def _publish(self, body: bytes) -> None:
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                if self.connection.channel is None:
                    raise Unavailable(self.connection.problem or "RabbitMQ is away.")
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
