"""Consume events from RabbitMQ: changes in the registry, and demand for a Deployment."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import DEMAND_PREFIX, EVENTS, REGISTRY_CHANGED, events_queue
from tidegate.kernel.http.answers import new_request_id


class EventConsumer:
    """A consumer of events for the autoscaler. Lost events do no harm, because the autoscaler also polls."""

    def __init__(
        self, amqp_url: str, *, on_registry: Callable[[], None], on_demand: Callable[[str], None]
    ) -> None:
        self._on_registry = on_registry
        self._on_demand = on_demand
        self._connection = Connection(amqp_url, "autoscaler events", self._setup)

    @property
    def problem(self) -> str | None:
        """Return what is wrong with the connection; None if it works."""
        return self._connection.problem

    async def __aenter__(self) -> Self:
        self._connection.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connection.stop()

    async def _setup(self, channel: Channel) -> None:
        # Each connection uses a new queue name, because the queue of the previous connection may still exist.
        queue = events_queue("autoscaler", new_request_id())
        await channel.declare(EVENTS)
        await channel.declare(queue)
        await channel.bind(queue, EVENTS, REGISTRY_CHANGED)
        await channel.bind(queue, EVENTS, f"{DEMAND_PREFIX}#")
        await channel.consume(queue, self._on_event, prefetch=100, no_ack=True)

    async def _on_event(self, delivery: Delivery) -> None:
        if delivery.routing_key == REGISTRY_CHANGED:
            self._on_registry()
        elif delivery.routing_key.startswith(DEMAND_PREFIX):
            self._on_demand(delivery.routing_key.removeprefix(DEMAND_PREFIX))
