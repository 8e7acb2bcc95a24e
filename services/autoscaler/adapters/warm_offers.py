"""Offer assignments to workers of a warm pool over RabbitMQ. One worker receives each offer."""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from typing import Self

from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import WARM, warm_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.models import Assignment


class WarmOffers:
    """A publisher of offers to the queues of the warm pools.

    Without a connection, :meth:`offer` raises ``Unavailable``.
    """

    def __init__(self, amqp_url: str, pools: Collection[str]) -> None:
        self._pools = pools
        self._connection = Connection(amqp_url, "autoscaler warm pool", self._setup)

    async def __aenter__(self) -> Self:
        if self._pools:
            self._connection.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connection.stop()

    async def offer(self, pool: str, assignment: Assignment, lives_s: float) -> None:
        """Offer an assignment to the waiting workers of a pool. The worker that takes it becomes the replica.

        Return after RabbitMQ's confirm. ``lives_s``: the seconds after which RabbitMQ drops the offer. Raise
        ``Unavailable`` if there is no connection or no confirm. Without a confirm, a worker may still get the
        offer.
        """
        channel = self._connection.channel
        if channel is None:
            raise Unavailable(self._connection.problem or "RabbitMQ is not connected.")
        await channel.publish(
            assignment.model_dump_json().encode(),
            exchange=WARM.name,
            routing_key=warm_queue(pool).name,
            expiration_ms=int(lives_s * 1000),
            mandatory=True,
        )

    async def _setup(self, channel: Channel) -> None:
        for pool in self._pools:
            await channel.declare(warm_queue(pool))
