"""The channel on Tidegate's own fast driver, for requests, replies and jobs (see ADR 002)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from pamqp import commands
from pamqp.base import Frame

from tidegate.kernel.broker.amqp.connection import (
    AmqpConnection,
    Congested,
    ConnectionLost,
    NotTaken,
    connect,
)
from tidegate.kernel.broker.amqp.wire import Delivered, Properties
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


async def open_channel(url: str, *, name: str, heartbeat_s: int, confirms: bool) -> AmqpChannel:
    """Connect and open a channel. Raises ``Unavailable`` or OSError."""
    try:
        return AmqpChannel(await connect(url, name=name, heartbeat_s=heartbeat_s, confirms=confirms))
    except ConnectionLost as error:
        raise _unavailable(error) from error


class AmqpChannel:
    """A ``Channel`` that uses a connection of ``tidegate.kernel.broker.amqp``."""

    def __init__(self, connection: AmqpConnection) -> None:
        self._connection = connection
        self.ended = connection.ended

    @property
    def blocked(self) -> bool:
        return self._connection.blocked

    async def find(self, exchange: Exchange) -> None:
        await self._call(
            commands.Exchange.Declare(exchange=exchange.name, exchange_type=exchange.kind, passive=True)
        )

    async def declare(self, what: Queue | Exchange, *, bind: bool = True) -> None:
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
        await self._call(
            commands.Queue.Bind(queue=queue.name, exchange=exchange.name, routing_key=routing_key)
        )

    async def depth(self, queue: Queue) -> int:
        answer = await self._declare(queue)
        return int(answer.message_count or 0)

    async def consumers(self, queue: Queue) -> int:
        answer = await self._declare(queue)
        return int(answer.consumer_count or 0)

    async def delete(self, queue: Queue) -> None:
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
        handle = delivery_handler(on_delivery, _delivery)
        try:
            return await self._connection.consume(
                queue.name, handle, prefetch=prefetch, no_ack=no_ack, exclusive=exclusive
            )
        except ConnectionLost as error:
            raise _unavailable(error) from error

    async def get(self, queue: Queue) -> Delivery | None:
        found = await self._call(commands.Basic.Get(queue=queue.name))
        return _delivery(found) if isinstance(found, Delivered) else None

    async def cancel(self, consumer_tag: str) -> None:
        try:
            await self._connection.cancel(consumer_tag)
        except ConnectionLost as error:
            raise _unavailable(error) from error

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        try:
            self._connection.ack(tag, multiple)
        except ConnectionLost as error:
            raise _unavailable(error) from error

    def nack(self, tag: int) -> None:
        try:
            self._connection.nack(tag)
        except ConnectionLost as error:
            raise _unavailable(error) from error

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
        properties = _properties(persistent, reply_to, expiration_ms, headers)
        # ``gather`` collects the messages of one turn of the event loop, and sends them in one write, which
        # is cheaper. So a message waits until the end of the turn. This does not matter, because each caller
        # waits for the broker's disk anyway.
        confirm = self._write(body, exchange, routing_key, mandatory, properties, gather=True)
        if confirm is not None:
            try:
                await confirm
            except (NotTaken, ConnectionLost) as error:
                raise _publish_error(error, routing_key) from error

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
        properties = _properties(False, reply_to, expiration_ms, None)
        confirm = self._write(body, exchange, routing_key, mandatory, properties)
        if confirm is not None:
            confirm.add_done_callback(partial(_report, routing_key, on_failure))

    def cork(self) -> AbstractContextManager[None]:
        return self._connection.cork

    async def close(self) -> None:
        await self._connection.close()

    def abort(self, reason: str) -> None:
        self._connection.abort(reason)

    def _write(
        self,
        body: bytes | Sequence[Buffer],
        exchange: str,
        routing_key: str,
        mandatory: bool,
        properties: Properties,
        *,
        gather: bool = False,
    ) -> asyncio.Future[None] | None:
        if self._connection.blocked:
            raise blocked_error()
        pieces = (body,) if isinstance(body, bytes) else body
        try:
            return self._connection.publish(
                pieces, exchange, routing_key, mandatory=mandatory, properties=properties, gather=gather
            )
        except Congested as error:
            raise Refused(f"{error}.", retry_after_s=1.0) from error
        except ConnectionLost as error:
            raise _unavailable(error) from error

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
        except ConnectionLost as error:
            raise _unavailable(error) from error


def _unavailable(error: ConnectionLost) -> Unavailable:
    return Unavailable(f"RabbitMQ: {error}")


def _properties(
    persistent: bool, reply_to: str | None, expiration_ms: float | None, headers: dict[str, Any] | None
) -> Properties:
    expiration = None if expiration_ms is None else str(min(max(1, int(expiration_ms)), MAX_EXPIRATION_MS))
    return Properties(persistent, reply_to, expiration, None, headers)


def _publish_error(error: NotTaken | ConnectionLost, routing_key: str) -> Unavailable:
    if isinstance(error, ConnectionLost):
        return _unavailable(error)
    return (
        unroutable_error(routing_key) if error.unroutable else Refused("The broker did not take the message.")
    )


def _report(
    routing_key: str, on_failure: Callable[[Unavailable], None] | None, confirm: asyncio.Future[None]
) -> None:
    error = confirm.exception()
    if on_failure is not None and isinstance(error, NotTaken | ConnectionLost):
        on_failure(_publish_error(error, routing_key))


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
