"""A channel that uses the library aio-pika (see ADR 002).

It is for connections that carry no requests, replies or jobs.
"""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import aio_pika
from aio_pika.abc import AbstractIncomingMessage, DeliveryMode
from aio_pika.exceptions import AMQPError, DeliveryError, PublishError
from aiormq import Channel as AiormqChannel
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from yarl import URL

from tidegate.kernel.broker.channel import (
    MAX_EXPIRATION_MS,
    Buffer,
    Delivery,
    OnDelivery,
    Refused,
    blocked_error,
    delivery_handler,
    unroutable_error,
)
from tidegate.kernel.broker.topology import Exchange, Queue
from tidegate.kernel.errors import Unavailable

T = TypeVar("T")

# The highest total size of unconfirmed messages, in bytes. Above this limit, publishing raises an error.
MAX_UNCONFIRMED = 256 * 2**20
# Errors that aio-pika raises on a channel or connection that has ended.
_LOST = (AMQPError, OSError, RuntimeError)


async def open_channel(url: str, *, name: str, heartbeat_s: int, confirms: bool) -> AioPikaChannel:
    """Connect and open a channel. Raises ``Unavailable`` or OSError."""
    connection = aio_pika.Connection(
        URL(url).update_query(heartbeat=heartbeat_s),
        client_properties={"product": "tidegate", "connection_name": name},
    )
    connection.kwargs["transport_factory"] = transport = _Transport()
    try:
        await connection.connect()
        channel = connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
        await channel.initialize()
        driver = await channel.get_underlay_channel()
        assert isinstance(driver, AiormqChannel)
    except BaseException as error:
        transport.abort()
        await connection.close()
        if isinstance(error, _LOST):
            raise Unavailable(f"RabbitMQ: {_reason(error)}") from error
        raise
    return AioPikaChannel(connection, channel, driver, transport, confirms)


class AioPikaChannel:
    """A ``Channel`` that uses the library aio-pika."""

    def __init__(
        self,
        connection: aio_pika.abc.AbstractConnection,
        channel: aio_pika.abc.AbstractChannel,
        driver: AiormqChannel,
        transport: _Transport,
        confirms: bool,
    ) -> None:
        self._connection = connection
        self._channel = channel
        self._driver = driver
        self._transport = transport
        self._confirms = confirms
        self._calls: set[asyncio.Future[Any]] = set()
        self._publishing: set[asyncio.Future[None]] = set()
        self._unconfirmed = 0
        self._settlements: deque[tuple[frozenset[asyncio.Future[None]], Callable[[], Any]]] = deque()
        self._settling: asyncio.Future[None] | None = None
        self._consumers_begun = 0
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        driver.closing.add_done_callback(self._on_closed)
        driver.connection.closing.add_done_callback(self._on_closed)
        driver.on_consumer_cancel_callbacks.add(self._on_consumer_cancelled)

    # --- opening and closing ---------------------------------------------------------------------------

    async def close(self) -> None:
        if not self.ended.done():
            # Wait for unfinished writes, because aiormq drops unwritten frames when it closes.
            waiting = {*self._publishing, *([self._settling] if self._settling else [])}
            if waiting:
                await asyncio.wait(waiting)
        self._end("closed")
        await self._connection.close()

    def abort(self, reason: str) -> None:
        self._transport.abort()
        self._end(reason)

    def _end(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)
        for call in self._calls:
            call.cancel()

    def _on_closed(self, closing: asyncio.Future[Any]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self._end(_reason(error))

    async def _on_consumer_cancelled(self, _: Any) -> None:
        self._end("the broker cancelled a consumer, because its queue was deleted")

    # --- methods that the broker answers ---------------------------------------------------------------

    async def find(self, exchange: Exchange) -> None:
        await self._call(self._channel.declare_exchange(exchange.name, exchange.kind, passive=True))

    async def declare(self, what: Queue | Exchange, *, bind: bool = True) -> None:
        if isinstance(what, Exchange):
            await self._call(self._channel.declare_exchange(what.name, what.kind, durable=True))
            return
        await self._declare(what)
        if bind and what.exchange is not None:
            await self.declare(what.exchange)
            await self.bind(what, what.exchange, what.name)

    async def bind(self, queue: Queue, exchange: Exchange, routing_key: str = "") -> None:
        await self._call(self._driver.queue_bind(queue.name, exchange.name, routing_key))

    async def depth(self, queue: Queue) -> int:
        found = await self._declare(queue)
        return int(found.declaration_result.message_count or 0)

    async def consumers(self, queue: Queue) -> int:
        found = await self._declare(queue)
        return int(found.declaration_result.consumer_count or 0)

    async def delete(self, queue: Queue) -> None:
        await self._call(self._channel.queue_delete(queue.name))

    async def consume(
        self,
        queue: Queue,
        on_delivery: OnDelivery,
        *,
        prefetch: int,
        no_ack: bool = False,
        exclusive: bool = False,
    ) -> str:
        handle = delivery_handler(on_delivery, _delivery)

        async def on_message(message: AbstractIncomingMessage) -> None:
            handle(message)

        self._consumers_begun += 1
        tag = f"c{self._consumers_begun}"
        await self._call(self._channel.set_qos(prefetch_count=prefetch))
        source = await self._channel.get_queue(queue.name, ensure=False)
        await self._call(source.consume(on_message, no_ack, exclusive, consumer_tag=tag))
        return tag

    async def get(self, queue: Queue) -> Delivery | None:
        source = await self._channel.get_queue(queue.name, ensure=False)
        # Set no timeout. After a timeout, aio-pika would ignore a message that arrives late, and the message
        # would stay unacked.
        message = await self._call(source.get(no_ack=False, fail=False, timeout=None))
        return None if message is None else _delivery(message)

    async def cancel(self, consumer_tag: str) -> None:
        await self._call(self._driver.basic_cancel(consumer_tag))

    async def _declare(self, queue: Queue) -> aio_pika.abc.AbstractQueue:
        return await self._call(
            self._channel.declare_queue(
                queue.name,
                durable=not queue.exclusive,
                exclusive=queue.exclusive,
                auto_delete=queue.auto_delete,
                arguments=dict(queue.arguments),
            )
        )

    # --- publishing and settling -----------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        return not _is_ready(self._driver.connection.ready())

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
        message = _message(body, expiration_ms, reply_to, persistent, headers)
        await self._result(self._publish(message, exchange, routing_key, mandatory))

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
        message = _message(body, expiration_ms, reply_to, False, None)
        publishing = self._publish(message, exchange, routing_key, mandatory)
        if on_failure is not None and self._confirms:
            publishing.add_done_callback(partial(self._report, on_failure))

    def cork(self) -> AbstractContextManager[None]:
        return nullcontext()  # no effect: aiormq decides which frames it writes together

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        self._settle(partial(self._driver.basic_ack, tag, multiple))

    def nack(self, tag: int) -> None:
        self._settle(partial(self._driver.basic_nack, tag, requeue=True))

    def _publish(
        self, message: aio_pika.Message, exchange: str, routing_key: str, mandatory: bool
    ) -> asyncio.Future[None]:
        self._check_open()
        if self.blocked:
            raise blocked_error()
        if self._unconfirmed > MAX_UNCONFIRMED:
            raise Refused(
                f"RabbitMQ is too slow: {self._unconfirmed} published bytes are not confirmed yet.",
                retry_after_s=1.0,
            )

        async def publish() -> None:
            try:
                # Do not call aio-pika's Exchange.publish, which waits for the socket after each message.
                await self._driver.basic_publish(
                    message.body,
                    exchange=exchange,
                    routing_key=routing_key,
                    properties=message.properties,
                    mandatory=mandatory,
                    wait=not self._confirms,
                )
            except PublishError as error:
                raise unroutable_error(routing_key) from error
            except DeliveryError as error:
                raise Refused("The broker did not take the message.") from error

        def on_done(publishing: asyncio.Future[None]) -> None:
            self._publishing.discard(publishing)
            self._unconfirmed -= message.body_size

        publishing = self._start(publish())
        self._publishing.add(publishing)
        self._unconfirmed += message.body_size
        publishing.add_done_callback(on_done)
        return publishing

    def _report(self, on_failure: Callable[[Unavailable], None], publishing: asyncio.Future[None]) -> None:
        error = None if publishing.cancelled() else publishing.exception()
        if isinstance(error, Unavailable):
            on_failure(error)
        elif error is not None or publishing.cancelled():
            on_failure(self._ended_error(error))

    def _settle(self, write: Callable[[], Any]) -> None:
        self._check_open()
        self._settlements.append((frozenset(self._publishing), write))
        if self._settling is None or self._settling.done():
            self._settling = self._start(self._write_settlements())

    async def _write_settlements(self) -> None:
        """Write acks and nacks in order, each after the messages that were published before it."""
        while self._settlements:
            published, write = self._settlements.popleft()
            if published:
                await asyncio.wait(published)
            await write()

    # --- calls to aio-pika -----------------------------------------------------------------------------

    async def _call(self, operation: Coroutine[Any, Any, T]) -> T:
        if self.ended.done():
            operation.close()
        self._check_open()
        return await self._result(self._start(operation))

    def _start(self, operation: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        # aiormq closes the channel if an operation is cancelled. So run the operation in a task of its own,
        # which is not cancelled with the caller.
        call = asyncio.ensure_future(operation)
        self._calls.add(call)
        call.add_done_callback(self._on_call_done)
        return call

    def _on_call_done(self, call: asyncio.Future[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # marks the error as read: else asyncio warns if the caller was cancelled

    async def _result(self, call: asyncio.Future[T]) -> T:
        either: set[asyncio.Future[Any]] = {call, self.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not call.done() or call.cancelled():
            raise self._ended_error(None)
        try:
            return call.result()
        except Unavailable:
            raise
        except _LOST as error:
            raise self._ended_error(error) from error

    def _check_open(self) -> None:
        if self.ended.done():
            raise self._ended_error(None)

    def _ended_error(self, error: BaseException | None) -> Unavailable:
        return Unavailable(f"RabbitMQ: {self.ended.result() if self.ended.done() else _reason(error)}")


class _Transport(TransportFactory):
    """A factory that stores the open socket, so that :meth:`abort` can close it at once."""

    def __init__(self) -> None:
        self._writer: StreamWriter | None = None

    async def create(self, url: URL, **options: Any) -> tuple[StreamReader, StreamWriter]:
        factory = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, self._writer = await factory.create(url, **options)
        return reader, self._writer

    def abort(self) -> None:
        """Close the socket immediately."""
        if self._writer is not None:
            self._writer.transport.abort()


def _is_ready(waiting: Coroutine[Any, Any, object]) -> bool:
    """Return True if a coroutine ends without waiting.

    aiormq's coroutine ``Connection.ready`` waits while the broker blocks the connection. aiormq has no other
    way to check whether the broker blocks the connection.
    """
    try:
        waiting.send(None)
    except StopIteration:
        return True
    waiting.close()
    return False


def _message(
    body: bytes | Sequence[Buffer],
    expiration_ms: float | None,
    reply_to: str | None,
    persistent: bool,
    headers: dict[str, Any] | None,
) -> aio_pika.Message:
    return aio_pika.Message(
        body if isinstance(body, bytes) else b"".join(body),
        headers=dict(headers or {}),
        delivery_mode=DeliveryMode.PERSISTENT if persistent else DeliveryMode.NOT_PERSISTENT,
        reply_to=reply_to,
        expiration=None
        if expiration_ms is None
        else timedelta(milliseconds=min(max(1, int(expiration_ms)), MAX_EXPIRATION_MS)),
    )


def _delivery(message: AbstractIncomingMessage) -> Delivery:
    return Delivery(
        body=message.body,
        tag=message.delivery_tag or 0,
        redelivered=bool(message.redelivered),
        reply_to=message.reply_to,
        routing_key=message.routing_key or "",
        exchange=message.exchange or "",
        headers=dict(message.headers),
    )


def _reason(error: BaseException | None) -> str:
    """Return why a connection ended, from aio-pika's error."""
    words = "" if error is None else " ".join(str(part) for part in error.args if part)
    return words or "the connection was lost"
