"""Publish which Deployments need a replica, and which requests were cancelled.

If the connection to the broker is lost, these messages may be lost too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import CANCELS, EVENTS, demand_key
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope

log = telemetry.logger(__name__)

DEMAND_EVERY_S = 1.0


class EventPublisher:
    """A publisher on the connection ``out``.

    It collects the requests that are cancelled in one event-loop turn, and publishes them in one message.
    """

    def __init__(self, out: Connection, spawn: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        self._out = out
        self._spawn = spawn
        self._demanded_at: dict[str, float] = {}
        self._cancelled: list[bytes] = []

    def demand(self, channel: Channel, deployment: str) -> None:
        """Publish that a Deployment has requests but no workers.

        For each Deployment, this is published at most once a second.
        """
        now = time.monotonic()
        if now - self._demanded_at.get(deployment, float("-inf")) >= DEMAND_EVERY_S:
            self._demanded_at[deployment] = now
            self._spawn(self._publish_demand(channel, deployment))

    def cancel(self, id_: bytes) -> None:
        """Publish that the workers must drop this request."""
        self._cancelled.append(id_)
        self._spawn(self._publish_cancels())

    async def _publish_demand(self, channel: Channel, deployment: str) -> None:
        try:
            await channel.publish(
                b'{"deployment":"%s"}' % deployment.encode(),
                exchange=EVENTS.name,
                routing_key=demand_key(deployment),
            )
        except Unavailable:
            log.info(
                "the connection to the broker was lost; a request to start a replica was not published",
                extra={"deployment": deployment},
            )

    async def _publish_cancels(self) -> None:
        ids, self._cancelled = self._cancelled, []
        await publish_cancels(self._out.channel, ids)


async def publish_cancels(channel: Channel | None, ids: Sequence[bytes]) -> None:
    """Publish that the workers must drop these requests. Do nothing without a connection."""
    if channel is None or not ids:
        return
    try:
        body = envelope.pack(envelope.CANCELS, list(ids))
        await channel.publish(body, exchange=CANCELS.name, routing_key="")
    except Unavailable:
        log.info(
            "the connection to the broker was lost; cancellations were not published",
            extra={"count": len(ids)},
        )
