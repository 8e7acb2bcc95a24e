"""Parts that the tests of the broker share."""

from __future__ import annotations

from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import Queue


class Inbox:
    """A consumer that keeps its deliveries, and acks them unless ``ack`` is False."""

    def __init__(self, queue: Queue, *, ack: bool = True, **how) -> None:
        self.queue = queue
        self.got: list[Delivery] = []
        self.setups = 0
        self._ack = ack
        self._how = {"prefetch": 100, **how}

    @property
    def bodies(self) -> list[bytes]:
        return [bytes(delivery.body) for delivery in self.got]

    async def setup(self, channel: Channel) -> None:
        async def on_delivery(delivery: Delivery) -> None:
            self.got.append(delivery)
            if self._ack and not self._how.get("no_ack"):
                channel.ack(delivery.tag)

        self.setups += 1
        await channel.declare(self.queue)
        await channel.consume(self.queue, on_delivery, **self._how)


async def nothing(_: Channel) -> None:
    return


def channel_of(connection: Connection) -> Channel:
    assert connection.channel is not None
    return connection.channel
