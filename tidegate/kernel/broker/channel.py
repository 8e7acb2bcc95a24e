"""The interface of RabbitMQ channels, which every AMQP driver implements."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tidegate.kernel import telemetry
from tidegate.kernel.broker.topology import Exchange, Queue
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

Buffer = bytes | memoryview
T = TypeVar("T")

MAX_EXPIRATION_MS = 2**32 - 1


class Unroutable(Unavailable):
    """The broker returned a mandatory message because no queue takes it."""

    reason = "unroutable"


class Refused(Unavailable):
    """The broker did not take a message.

    Either a queue is full, or the broker failed, or it does not read from the connection.
    """

    reason = "refused"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivered message. ``tag`` is valid only on the channel that delivered the message."""

    body: Buffer
    tag: int
    redelivered: bool
    reply_to: str | None
    routing_key: str
    exchange: str
    headers: dict[str, Any]


OnDelivery = Callable[[Delivery], Awaitable[None] | None]


class Channel(Protocol):
    """A channel to RabbitMQ.

    After a channel has ended, each method raises ``Unavailable``. A reconnect opens a new channel.
    """

    @property
    def blocked(self) -> bool:
        """True while the broker takes no messages, because it is short of memory or disk."""

    async def find(self, exchange: Exchange) -> None:
        """Raise ``Unavailable`` if the broker does not have this exchange.

        A service needs no permission at RabbitMQ for this check.
        """

    async def declare(self, what: Queue | Exchange, *, bind: bool = True) -> None:
        """Declare a queue or an exchange. Does nothing if it exists with the same arguments.

        If ``what`` is a queue with an ``exchange``, the queue is also bound to this exchange. If ``bind`` is
        False, the queue is not bound here, because another service binds it.
        """

    async def bind(self, queue: Queue, exchange: Exchange, routing_key: str = "") -> None:
        """Bind ``queue`` to ``exchange``, so that the queue gets the messages that match ``routing_key``."""

    async def depth(self, queue: Queue) -> int:
        """Return how many messages of ``queue`` wait for a consumer. Declares the queue."""

    async def consumers(self, queue: Queue) -> int:
        """Return how many consumers ``queue`` has. Declares the queue."""

    async def delete(self, queue: Queue) -> None:
        """Delete a queue with all its messages."""

    async def consume(
        self,
        queue: Queue,
        on_delivery: OnDelivery,
        *,
        prefetch: int,
        no_ack: bool = False,
        exclusive: bool = False,
    ) -> str:
        """Start a consumer that gets up to ``prefetch`` unacked messages. Return the consumer's tag.

        ``on_delivery`` is called for each message, in the order of arrival. If it returns an awaitable, the
        awaitable runs as a task.
        """

    async def get(self, queue: Queue) -> Delivery | None:
        """Return the next message of ``queue``, or None if no message waits.

        A consumer's ``prefetch`` does not limit how many messages this method returns.
        """

    async def cancel(self, consumer_tag: str) -> None:
        """Stop a consumer.

        Its unacked messages are not redelivered until the channel ends; they can still be acked.
        """

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """Ack a delivery. With ``multiple``, also ack all earlier ones. Does not wait for the socket."""

    def nack(self, tag: int) -> None:
        """Let the broker deliver a message again, to any consumer. Does not wait for the socket."""

    async def publish(
        self,
        body: bytes | Sequence[Buffer],
        *,
        exchange: str = "",
        routing_key: str,
        expiration_ms: float | None = None,
        reply_to: str | None = None,
        mandatory: bool = False,
        persistent: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> None:
        """Publish a message, and return when the broker has confirmed it.

        If the connection was opened without confirms, return immediately. ``body``: the message, whole or in
        pieces. Raises :class:`Unroutable` for a mandatory message that no queue takes, and ``Unavailable`` if
        the connection breaks. Raises :class:`Refused` if the broker does not take the message, or does not
        read earlier messages.

        RabbitMQ closes the channel if the expiration is too short or too long. So an ``expiration_ms``
        outside 1 ms .. 49 days is replaced by the nearer limit.
        """

    def send(
        self,
        body: bytes | Sequence[Buffer],
        *,
        exchange: str = "",
        routing_key: str,
        expiration_ms: float | None = None,
        reply_to: str | None = None,
        mandatory: bool = False,
        on_failure: Callable[[Unavailable], None] | None = None,
    ) -> None:
        """Publish without waiting. The broker gets the message before any ack that is written later.

        Raises the errors of :meth:`publish` that are known immediately. ``on_failure`` is called with an
        error that is known only later. If the connection was opened without confirms, ``on_failure`` is never
        called.
        """

    def cork(self) -> AbstractContextManager[None]:
        """Return a context manager that collects messages and acks, and sends them in one write.

        This write happens at the end of the context. In the aio-pika driver, the context has no effect.
        """


class DriverChannel(Channel, Protocol):
    """A channel together with its TCP connection. ``Connection`` opens and closes both."""

    @property
    def ended(self) -> asyncio.Future[str]:
        """A future that is done when the channel has ended. Its result says why."""

    async def close(self) -> None:
        """Send all written bytes, and close the connection. Unacked messages return to their queues."""

    def abort(self, reason: str) -> None:
        """End the connection immediately, without waiting for the broker."""


def blocked_error() -> Refused:
    """Return the error for a message that is published while the channel is blocked."""
    return Refused("RabbitMQ takes no messages: it is short of memory or disk.", retry_after_s=5.0)


def unroutable_error(routing_key: str) -> Unroutable:
    """Return the error for a mandatory message that the broker returned."""
    return Unroutable(f"No queue for {routing_key!r}.")


def delivery_handler(on_delivery: OnDelivery, decode: Callable[[T], Delivery]) -> Callable[[T], None]:
    """Return a function that handles a driver's delivery and never raises.

    It logs errors of ``on_delivery``. After an error, the message stays unacked.
    """
    running: set[asyncio.Future[None]] = set()

    def on_task_done(task: asyncio.Future[None]) -> None:
        running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("handling a delivery failed; it stays unacked", exc_info=error)

    def handle(delivered: T) -> None:
        try:
            awaitable = on_delivery(decode(delivered))
        except Exception:
            # If this error reached the driver, it would end the connection.
            log.exception("handling a delivery failed; it stays unacked")
            return
        if awaitable is not None:
            task = asyncio.ensure_future(awaitable)
            running.add(task)
            task.add_done_callback(on_task_done)

    return handle
