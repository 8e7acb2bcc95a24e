"""RabbitMQ, for the whole of Tidegate: the only user of ``tidegate.kernel.broker.amqp``.

A :class:`Connection` is one connection with one channel that comes back for ever. Whoever owns it gives a
``setup`` coroutine that declares and consumes; it runs again after every reconnect, and after the
broker cancelled a consumer (a deleted queue), so no consumer is ever silently gone.

Publish and consume on separate links: RabbitMQ blocks a connection that publishes while its memory
alarm is on, and the acks on that connection with it. Only what must precede an ack anyway goes on its link.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from pamqp import commands
from pamqp.base import Frame

from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.amqp.connection import AmqpConnection, Congested, Lost, NotTaken, connect
from tidegate.kernel.broker.amqp.wire import Buffer, Delivered, Properties
from tidegate.kernel.broker.topology import Exchange, Queue
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
HEARTBEAT_S = 20
BACKOFF_S = (0.05, 2.0)
MAX_EXPIRATION_MS = 2**32 - 1


class Unroutable(Unavailable):
    """The broker returned a mandatory message: the queue it was for does not exist."""

    reason = "unroutable"


class Refused(Unavailable):
    """The broker would not take a message: a limit of its queue, a fault of its own, or it does not read."""

    reason = "refused"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as it came; ``tag`` is valid on the session that delivered it and on no other."""

    body: Buffer
    tag: int
    redelivered: bool
    reply_to: str | None
    routing_key: str
    exchange: str
    headers: dict[str, Any]


OnDelivery = Callable[[Delivery], Awaitable[None] | None]


class Channel:
    """One incarnation of a channel. It is not reused: a reconnect brings a new one."""

    def __init__(self, connection: AmqpConnection) -> None:
        self._connection = connection
        self._tasks: set[asyncio.Future[None]] = set()

    @property
    def blocked(self) -> bool:
        """Whether the broker takes no messages now, for want of memory or disk."""
        return self._connection.blocked

    async def find(self, exchange: Exchange) -> None:
        """Return if an exchange exists; raises Unavailable otherwise. It needs no permission."""
        await self._call(
            commands.Exchange.Declare(exchange=exchange.name, exchange_type=exchange.kind, passive=True)
        )

    async def declare(self, what: Queue | Exchange, *, bind: bool = True) -> None:
        """Declare a queue or an exchange; a no-op when it is there with the same arguments.

        A queue that has an exchange is bound to it as well, unless ``bind`` is False: a service that may
        not bind the queue leaves that to its owner.
        """
        if isinstance(what, Exchange):
            await self._call(
                commands.Exchange.Declare(exchange=what.name, exchange_type=what.kind, durable=True)
            )
            return
        await self._declare(what)
        if bind and what.exchange is not None:
            await self.declare(what.exchange)
            await self.bind(what, what.exchange, what.name)

    async def bind(self, queue: Queue, exchange: Exchange, routing_key: str = "") -> None:
        """Let ``exchange`` copy to ``queue`` what matches ``routing_key``."""
        await self._call(
            commands.Queue.Bind(queue=queue.name, exchange=exchange.name, routing_key=routing_key)
        )

    async def depth(self, queue: Queue) -> int:
        """Messages that wait in ``queue`` and are with no consumer yet; declares it if need be."""
        answer = await self._declare(queue)
        return int(answer.message_count or 0)

    async def consumers(self, queue: Queue) -> int:
        """Return how many consumers ``queue`` has; declares it if need be."""
        answer = await self._declare(queue)
        return int(answer.consumer_count or 0)

    async def delete(self, queue: Queue) -> None:
        """Delete a queue with everything in it."""
        await self._call(commands.Queue.Delete(queue=queue.name))

    async def consume(
        self,
        queue: Queue,
        on_delivery: OnDelivery,
        *,
        prefetch: int,
        no_ack: bool = False,
        exclusive: bool = False,
    ) -> str:
        """Start a consumer and return its tag. ``prefetch`` bounds what it holds unsettled.

        ``on_delivery`` is called in the order of arrival; where it gives an awaitable, that runs as a task.
        """

        def on_delivered(delivered: Delivered) -> None:
            try:
                awaitable = on_delivery(_delivery(delivered))
            except Exception:
                # Nobody thought of it. What is to be acked stays unsettled; raised here it would take the
                # connection along.
                log.exception("a delivery was not handled")
                return
            if awaitable is not None:
                task = asyncio.ensure_future(awaitable)
                self._tasks.add(task)
                task.add_done_callback(self._on_task_done)

        try:
            return await self._connection.consume(
                queue.name, on_delivered, prefetch=prefetch, no_ack=no_ack, exclusive=exclusive
            )
        except Lost as error:
            raise Unavailable(f"RabbitMQ: {error}") from error

    async def cancel(self, consumer_tag: str) -> None:
        """Stop a consumer; what it holds stays unsettled until acked or the session ends."""
        try:
            await self._connection.cancel(consumer_tag)
        except Lost as error:
            raise Unavailable(f"RabbitMQ: {error}") from error

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """Settle a delivery (``multiple``: and every earlier one). Does not wait for the socket."""
        try:
            self._connection.ack(tag, multiple)
        except Lost as error:
            raise Unavailable(f"RabbitMQ: {error}") from error

    def nack(self, tag: int) -> None:
        """Let the broker deliver a message again, to whoever is next. Does not wait for the socket."""
        try:
            self._connection.nack(tag)
        except Lost as error:
            raise Unavailable(f"RabbitMQ: {error}") from error

    async def publish(
        self,
        body: bytes | Sequence[Buffer],
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

        A ``body`` in pieces is written without joining them.
        Raises :class:`Unroutable` for a mandatory message without a queue, :class:`Refused` for one
        that was not taken, also because the broker does not read what was sent before it, ``Unavailable``
        when the connection broke. ``expiration_ms`` below 1 is sent as 1, and above 49 days as that:
        RabbitMQ closes the channel on anything else.
        """
        properties = _properties(persistent, reply_to, expiration_ms, headers)
        confirm = self._write(body, exchange, routing_key, mandatory, properties)
        if confirm is not None:
            try:
                await confirm
            except (NotTaken, Lost) as error:
                raise _meaning(error, routing_key) from error

    def send(
        self,
        body: bytes | Sequence[Buffer],
        *,
        exchange: str = "",
        routing_key: str,
        expiration_ms: int | None = None,
        reply_to: str | None = None,
        mandatory: bool = False,
        on_failure: Callable[[Unavailable], None] | None = None,
    ) -> None:
        """Publish without waiting, before anything that is written later, as an ack.

        Raises what :meth:`publish` does where that is known at once. ``on_failure`` is called with what is
        learned later; on a link without confirms that is nothing.
        """
        properties = _properties(False, reply_to, expiration_ms, None)
        confirm = self._write(body, exchange, routing_key, mandatory, properties)
        if confirm is not None:
            confirm.add_done_callback(partial(_report, routing_key, on_failure))

    def cork(self) -> contextlib.AbstractContextManager[None]:
        """Within it, what is sent and acked waits for its end and then goes in one write."""
        return self._connection.cork

    def _write(
        self,
        body: bytes | Sequence[Buffer],
        exchange: str,
        routing_key: str,
        mandatory: bool,
        properties: Properties,
    ) -> asyncio.Future[None] | None:
        if self._connection.blocked:
            raise Refused("RabbitMQ takes no messages: it is short of memory or disk.", retry_after_s=5.0)
        pieces = (body,) if isinstance(body, bytes) else body
        try:
            return self._connection.publish(
                pieces, exchange, routing_key, mandatory=mandatory, properties=properties
            )
        except Congested as error:
            raise Refused(f"{error}.", retry_after_s=1.0) from error
        except Lost as error:
            raise Unavailable(f"RabbitMQ: {error}") from error

    async def _declare(self, queue: Queue) -> Any:
        return await self._call(
            commands.Queue.Declare(
                queue=queue.name,
                durable=not queue.exclusive,
                exclusive=queue.exclusive,
                auto_delete=queue.auto_delete,
                arguments=dict(queue.arguments),
            )
        )

    async def _call(self, command: Frame) -> Any:
        try:
            return await self._connection.call(command)
        except Lost as error:
            raise Unavailable(f"RabbitMQ: {error}") from error

    def _on_task_done(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a delivery was not handled", exc_info=error)


def _properties(
    persistent: bool, reply_to: str | None, expiration_ms: int | None, headers: dict[str, Any] | None
) -> Properties:
    expiration = None if expiration_ms is None else str(min(max(1, int(expiration_ms)), MAX_EXPIRATION_MS))
    return Properties(persistent, reply_to, expiration, None, headers)


def _meaning(error: NotTaken | Lost, routing_key: str) -> Unavailable:
    if isinstance(error, Lost):
        return Unavailable(f"RabbitMQ: {error}")
    if error.unroutable:
        return Unroutable(f"No queue for {routing_key!r}.")
    return Refused("The broker did not take the message.")


def _report(
    routing_key: str, on_failure: Callable[[Unavailable], None] | None, confirm: asyncio.Future[None]
) -> None:
    error = confirm.exception()
    if on_failure is not None and isinstance(error, NotTaken | Lost):
        on_failure(_meaning(error, routing_key))


def _delivery(delivered: Delivered) -> Delivery:
    properties = delivered.properties
    return Delivery(
        body=delivered.body,
        tag=delivered.tag,
        redelivered=delivered.redelivered,
        reply_to=properties.reply_to,
        routing_key=delivered.routing_key,
        exchange=delivered.exchange,
        headers=properties.headers or {},
    )


Setup = Callable[[Channel], Awaitable[None]]


class Connection:
    """A connection that comes back. ``channel`` is None while it is away."""

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
        self._url = url
        self._name = name
        self._setup = setup
        self._on_down = on_down
        self._on_up = on_up
        self._confirms = confirms
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.channel: Channel | None = None
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
        """Close the connection, what was written before it; unsettled deliveries go back to their queues."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=CLOSE_TIMEOUT_S)
        await tasks.end(self._task)
        self._task = None

    async def wait_up(self, timeout_s: float) -> Channel:
        """The session, once there is one; raises ``Unavailable`` after ``timeout_s``."""
        channel = self.channel
        while channel is None:
            try:
                await asyncio.wait_for(self._up.wait(), timeout_s)
            except TimeoutError:
                raise Unavailable(self.problem or "RabbitMQ does not answer.") from None
            channel = self.channel
        return channel

    async def _run(self) -> None:
        delay = BACKOFF_S[0]
        while True:
            try:
                await self._live()
                delay = BACKOFF_S[0]
            except TimeoutError:
                self._note("RabbitMQ did not answer in time.")
            except (Unavailable, OSError) as error:
                self._note(f"RabbitMQ: {error or type(error).__name__}")
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, BACKOFF_S[1])

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("broker link is down", extra={"link": self._name, "problem": problem})
        self.problem = problem

    async def _live(self) -> None:
        """One life of the connection: returns when a session that was up has ended."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connection = await connect(
                self._url, name=self._name, heartbeat_s=HEARTBEAT_S, confirms=self._confirms
            )
        try:
            channel = Channel(connection)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._setup(channel)
            self.channel, self.problem = channel, None
            self._up.set()
            if self._on_up is not None:
                self._on_up()
            self._note(f"RabbitMQ: {await asyncio.shield(connection.ended)}")
        finally:
            if self.channel is not None:
                self.channel = None
                self._up.clear()
                if self._on_down is not None:
                    self._on_down()
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S):
                        await connection.close()
            finally:  # who ends this task does not wait for long
                connection.abort("closed")
