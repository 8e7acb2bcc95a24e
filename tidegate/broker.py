"""RabbitMQ, for the whole of Tidegate: the only importer of aiormq.

A :class:`Link` is one connection with one channel that comes back for ever. Whoever owns it gives a
``setup`` coroutine that declares and consumes; it runs again after every reconnect, and after the
broker cancelled a consumer (a deleted queue), so no consumer is ever silently gone.

Publish and consume on separate links: RabbitMQ blocks a connection that publishes while its memory
alarm is on, and the acks on that connection with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiormq
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp import commands as spec
from yarl import URL

from tidegate import telemetry
from tidegate.errors import Unavailable
from tidegate.topology import Exchange, Queue

log = telemetry.logger(__name__)

CONNECT_TIMEOUT_S = 5.0
HEARTBEAT_S = 20
BACKOFF_S = (0.05, 2.0)

_LOST = (aiormq.AMQPError, ConnectionError, OSError, asyncio.InvalidStateError, RuntimeError)


class Unroutable(Unavailable):
    """The broker returned a mandatory message: the queue it was for does not exist."""

    reason = "unroutable"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as it came; ``tag`` is valid on the session that delivered it and on no other."""

    body: bytes
    tag: int
    redelivered: bool
    reply_to: str | None
    routing_key: str
    exchange: str
    headers: dict[str, Any]


OnDelivery = Callable[[Delivery], Awaitable[None]]


class Session:
    """One incarnation of a channel. It is not reused: a reconnect brings a new one."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def declare(self, what: Queue | Exchange) -> None:
        """Declare a queue or an exchange; a no-op when it is there with the same arguments."""
        if isinstance(what, Exchange):
            await self._channel.exchange_declare(what.name, exchange_type=what.kind, durable=True)
            return
        await self._channel.queue_declare(
            what.name,
            durable=not what.exclusive,
            exclusive=what.exclusive,
            auto_delete=what.auto_delete,
            arguments=dict(what.arguments),
        )

    async def bind(self, queue: Queue, exchange: Exchange, routing_key: str = "") -> None:
        """Let ``exchange`` copy to ``queue`` what matches ``routing_key``."""
        await self._channel.queue_bind(queue.name, exchange.name, routing_key)

    async def depth(self, queue: Queue) -> int:
        """Messages that wait in ``queue`` and are with no consumer yet; declares it if need be."""
        answer = await self._channel.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))
        return answer.message_count or 0

    async def delete(self, queue: Queue) -> None:
        """Delete a queue with everything in it."""
        await self._channel.queue_delete(queue.name)

    async def consume(
        self,
        queue: Queue,
        on_delivery: OnDelivery,
        *,
        prefetch: int,
        no_ack: bool = False,
        exclusive: bool = False,
    ) -> str:
        """Start a consumer and return its tag. ``prefetch`` bounds what it holds unsettled."""
        await self._channel.basic_qos(prefetch_count=prefetch)

        async def on_message(message: DeliveredMessage) -> None:
            await on_delivery(_delivery(message))

        answer = await self._channel.basic_consume(queue.name, on_message, no_ack=no_ack, exclusive=exclusive)
        assert answer.consumer_tag is not None
        return answer.consumer_tag

    async def cancel(self, consumer_tag: str) -> None:
        """Stop a consumer; what it holds stays unsettled until acked or the session ends."""
        await self._channel.basic_cancel(consumer_tag)

    async def ack(self, tag: int, *, multiple: bool = False) -> None:
        """Settle a delivery (``multiple``: and every earlier one). Does not wait for the socket."""
        try:
            await self._channel.basic_ack(tag, multiple=multiple, wait=False)
        except _LOST as error:
            raise Unavailable("The broker went away.") from error

    async def publish(
        self,
        body: bytes,
        *,
        exchange: str = "",
        routing_key: str,
        expiration_ms: int | None = None,
        reply_to: str | None = None,
        mandatory: bool = False,
        persistent: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> None:
        """Publish; returns when the broker confirmed (at once on a link without confirms).

        Raises :class:`Unroutable` for a mandatory message without a queue, ``Unavailable`` when it
        was refused or the connection broke. ``expiration_ms`` below 1 is sent as 1: RabbitMQ closes
        the channel on less.
        """
        properties = spec.Basic.Properties(
            delivery_mode=2 if persistent else 1,
            expiration=None if expiration_ms is None else str(max(1, int(expiration_ms))),
            reply_to=reply_to,
            headers=headers or {},
        )
        try:
            await self._channel.basic_publish(
                body,
                exchange=exchange,
                routing_key=routing_key,
                properties=properties,
                mandatory=mandatory,
                wait=False,
            )
        except aiormq.exceptions.PublishError as error:
            raise Unroutable(f"No queue for {routing_key!r}.") from error
        except (aiormq.exceptions.DeliveryError, *_LOST) as error:
            raise Unavailable("The broker did not take the message.") from error


def _delivery(message: DeliveredMessage) -> Delivery:
    method, properties = message.delivery, message.header.properties
    assert isinstance(method, spec.Basic.Deliver)
    return Delivery(
        body=message.body,
        tag=method.delivery_tag or 0,
        redelivered=bool(method.redelivered),
        reply_to=properties.reply_to or None,
        routing_key=method.routing_key or "",
        exchange=method.exchange or "",
        headers=properties.headers or {},
    )


Setup = Callable[[Session], Awaitable[None]]


class Link:
    """A connection that comes back. ``session`` is None while it is away."""

    def __init__(
        self,
        url: str,
        name: str,
        setup: Setup,
        on_down: Callable[[], None] | None = None,
        *,
        on_up: Callable[[], None] | None = None,
        confirms: bool = True,
    ) -> None:
        self._url = URL(url).update_query(heartbeat=str(HEARTBEAT_S), name=name)
        self._name = name
        self._setup = setup
        self._on_down = on_down
        self._on_up = on_up
        self._confirms = confirms
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.session: Session | None = None
        self.problem: str | None = "RabbitMQ is not connected yet."

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def start(self) -> None:
        """Begin connecting, in the background."""
        self._task = asyncio.create_task(self._run(), name=f"link {self._name}")

    async def stop(self) -> None:
        """Close the connection; unsettled deliveries go back to their queues."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def wait_up(self, timeout_s: float) -> Session:
        """The session, once there is one; raises ``Unavailable`` after ``timeout_s``."""
        try:
            await asyncio.wait_for(self._up.wait(), timeout_s)
        except TimeoutError:
            raise Unavailable(self.problem or "RabbitMQ does not answer.") from None
        assert self.session is not None
        return self.session

    async def _run(self) -> None:
        delay = BACKOFF_S[0]
        while True:
            try:
                await self._live()
                delay = BACKOFF_S[0]
            except _LOST as error:
                self._note(f"RabbitMQ: {error or type(error).__name__}")
            except TimeoutError:
                self._note("RabbitMQ did not answer in time.")
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, BACKOFF_S[1])

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("broker link is down", extra={"link": self._name, "problem": problem})
        self.problem = problem

    async def _live(self) -> None:
        """One life of the connection: returns when a session that was up has ended."""
        lost = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connection = await aiormq.connect(self._url)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                channel = await connection.channel(publisher_confirms=self._confirms, on_return_raises=True)
                assert isinstance(channel, Channel)
                channel.on_consumer_cancel_callbacks.add(lambda _: lost.cancel())
                session = Session(channel)
                await self._setup(session)
            self.session, self.problem = session, None
            self._up.set()
            if self._on_up is not None:
                self._on_up()
            await asyncio.wait(
                {lost, channel.closing, connection.closing}, return_when=asyncio.FIRST_COMPLETED
            )
            self._note("RabbitMQ: the connection was lost.")
        finally:
            if self.session is not None:
                self.session = None
                self._up.clear()
                if self._on_down is not None:
                    self._on_down()
            with contextlib.suppress(Exception):
                async with asyncio.timeout(1.0):
                    await connection.close()
