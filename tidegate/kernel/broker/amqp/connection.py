"""One AMQP connection with one channel. It never reconnects; ``broker.connection`` opens a new one."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Sequence
from typing import Any, cast
from urllib.parse import SplitResult, unquote, urlsplit

from pamqp import commands
from pamqp.base import Frame

from tidegate.kernel.broker.amqp import wire
from tidegate.kernel.broker.amqp.wire import (
    FRAME_MAX,
    AmqpMethod,
    Confirmed,
    Delivered,
    Heartbeat,
    MalformedFrame,
    Properties,
    Returned,
)

CHANNEL = 1
READ_SIZE = 256 * 1024
# A message of at least this many bytes is written to the socket in pieces. The pieces of a smaller message
# are joined first, because one write is cheaper.
SCATTER = 64 * 1024
# The highest number of messages that ``gather`` of :meth:`AmqpConnection.publish` collects for one write. It
# is low, because ``MAX_UNSENT`` does not limit collected messages.
MOST_GATHERED = 64
# The highest number of unsent bytes while the broker does not read. Above it, publishing raises an error.
MAX_UNSENT = 256 * 2**20
_PORTS = {"amqp": 5672, "amqps": 5671}
_CAPABILITIES = {
    "publisher_confirms": True,
    "basic.nack": True,
    "consumer_cancel_notify": True,
    "connection.blocked": True,
    "authentication_failure_close": True,
}


class Cork(contextlib.AbstractContextManager[None]):
    """A context manager that collects what a connection writes, and sends it at the end of the block.

    Each connection has one Cork, which is used for many blocks. Its blocks must not be nested, because the
    end of an inner block would send the bytes of the outer block.
    """

    def __init__(self, connection: AmqpConnection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.hold()

    def __exit__(self, *error: object) -> None:
        self._connection.release()


OnDelivered = Callable[[Delivered], None]


class ConnectionLost(ConnectionError):
    """The error if the connection or its channel has ended. The message says why."""


class Congested(Exception):
    """The error if the broker reads too slowly. The message says how many bytes wait."""


class NotTaken(Exception):
    """The error if the broker did not take a message.

    Either no queue takes the mandatory message (``unroutable``), or the broker answered with a nack.
    """

    def __init__(self, unroutable: bool) -> None:
        super().__init__("no queue for it" if unroutable else "the broker refused it")
        self.unroutable = unroutable


async def connect(url: str, *, name: str, heartbeat_s: int, confirms: bool) -> AmqpConnection:
    """Open a connection and its channel. Raises :class:`ConnectionLost` or OSError."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    secure = ssl.create_default_context() if parts.scheme == "amqps" else None
    port = parts.port or _PORTS[parts.scheme]
    connection = AmqpConnection(heartbeat_s)
    await loop.create_connection(lambda: connection, parts.hostname or "127.0.0.1", port, ssl=secure)
    try:
        await connection.open(parts, name, confirms)
    except BaseException:
        connection.abort("opening failed")
        raise
    return connection


class AmqpConnection(asyncio.BufferedProtocol):
    """An AMQP connection with one channel. Methods with an answer run one at a time.

    Publish and ack return immediately. They write to the socket immediately, except after :meth:`hold` and
    after a publish with ``gather``. ``ended``: a future that is done when the connection has ended; its
    result is the reason.
    """

    def __init__(self, heartbeat_s: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = wire.FrameReader()
        self._read = memoryview(bytearray(READ_SIZE))
        self._in_place = False
        self._heartbeat_s = heartbeat_s
        self._frame_max = FRAME_MAX
        self._transport: asyncio.Transport | None = None
        self._consumers: dict[str, OnDelivered] = {}
        self._consumers_begun = 0
        self._answer: asyncio.Future[Any] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._confirms = False
        self._published = 0
        self._open: dict[int, asyncio.Future[None]] = {}
        self._unroutable: set[int] = set()
        self._heard_at = self._loop.time()
        self._beat: asyncio.TimerHandle | None = None
        self._slow = False
        self.blocked = False
        self.held: list[bytes] | None = None
        self.cork = Cork(self)
        self.ended: asyncio.Future[str] = self._loop.create_future()

    # --- opening and closing ---------------------------------------------------------------------------

    async def open(self, parts: SplitResult, name: str, confirms: bool) -> None:
        """Do the handshake: start, tune, open, channel, confirm mode."""
        user, password = unquote(parts.username or "guest"), unquote(parts.password or "guest")
        start = self._expect()
        self.write(b"AMQP\x00\x00\x09\x01")
        await start
        properties: dict[str, Any] = {
            "product": "tidegate",
            "connection_name": name,
            "capabilities": _CAPABILITIES,
        }
        start_ok = commands.Connection.StartOk(properties, "PLAIN", f"\x00{user}\x00{password}", "en_US")
        tune = await self._call(start_ok, channel=0)
        if not isinstance(tune, commands.Connection.Tune):
            raise ConnectionLost(f"the broker answered the login with {type(tune).__name__}, expected Tune")
        self._frame_max = self._reader.frame_max = min(tune.frame_max or FRAME_MAX, FRAME_MAX)
        self._send(commands.Connection.TuneOk(1, self._frame_max, self._heartbeat_s), channel=0)
        vhost = unquote(parts.path[1:]) or "/"
        await self._call(commands.Connection.Open(vhost), channel=0)
        await self._call(commands.Channel.Open())
        if confirms:
            await self._call(commands.Confirm.Select())
            self._confirms = True
        self._pulse()

    async def close(self) -> None:
        """Announce the end to the broker, then close. Unacked messages return to their queues."""
        if self.ended.done():
            return
        with contextlib.suppress(ConnectionLost):
            await self._call(commands.Connection.Close(200, "bye", 0, 0), channel=0)
        self.abort("closed")

    def abort(self, reason: str) -> None:
        """End immediately, without waiting for the broker."""
        self.release()
        if self._transport is not None:
            self._transport.abort()
        self._end(reason)

    def _end(self, reason: str) -> None:
        if self.ended.done():
            return
        self.ended.set_result(reason)
        if self._beat is not None:
            self._beat.cancel()
        for future in [*self._open.values(), *([self._answer] if self._answer else [])]:
            if not future.done():
                future.set_exception(ConnectionLost(reason))
                future.exception()  # marks the error as read: else asyncio warns if the caller was cancelled
        self._open.clear()

    # --- asyncio.BufferedProtocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport of the new socket."""
        # Cast without a check of the class: uvloop's transport does not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        """End this connection, because the socket is closed."""
        self._end(f"the connection was lost{f': {error}' if error else ''}")

    def pause_writing(self) -> None:
        """Record that the broker reads too slowly. From now on, publishing checks the unsent bytes."""
        self._slow = True

    def resume_writing(self) -> None:
        """Record that nearly all bytes are sent, so the broker is not too slow any more."""
        self._slow = False

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer for the next bytes.

        The content of a large message is read directly into its own buffer, without a copy.
        """
        place = self._reader.window()
        self._in_place = place is not None
        return self._read[: self._reader.appetite(READ_SIZE)] if place is None else place

    def buffer_updated(self, nbytes: int) -> None:
        """Handle bytes from the broker."""
        self._heard_at = self._loop.time()
        if self._in_place:
            self._reader.took(nbytes)
            return
        try:
            for event in self._reader.feed(bytes(self._read[:nbytes])):
                self._on_event(event)
        except (MalformedFrame, ValueError, IndexError) as error:
            self.abort(f"the broker's frames cannot be read: {error}")

    def _on_event(self, event: wire.Event) -> None:
        match event:
            case Delivered():
                consumer = self._consumers.get(event.consumer_tag)
                if consumer is not None:
                    consumer(event)
                elif not event.consumer_tag:
                    self._on_answer(event)
            case Confirmed():
                self._on_confirmed(event)
            case Returned():
                number = int(event.properties.message_id or 0)
                if number in self._open:
                    self._unroutable.add(number)
            case AmqpMethod():
                self._on_method(event.frame)
            case Heartbeat():
                pass

    def _on_confirmed(self, confirmed: Confirmed) -> None:
        tags = [confirmed.tag]
        if confirmed.multiple:
            tags = [tag for tag in self._open if tag <= confirmed.tag]
        for tag in tags:
            future = self._open.pop(tag, None)
            unroutable = tag in self._unroutable
            self._unroutable.discard(tag)
            if future is None or future.done():
                continue
            if unroutable or not confirmed.taken:
                future.set_exception(NotTaken(unroutable))
            else:
                future.set_result(None)

    def _on_method(self, method: Any) -> None:
        match method:
            case commands.Channel.Close():
                self._send(commands.Channel.CloseOk())
                self.abort(f"the broker closed the channel: {method.reply_code} {method.reply_text}")
            case commands.Connection.Close():
                self._send(commands.Connection.CloseOk(), channel=0)
                self.abort(f"the broker closed the connection: {method.reply_code} {method.reply_text}")
            case commands.Basic.Cancel():
                self.abort("the broker cancelled a consumer, because its queue was deleted")
            case commands.Connection.Blocked():
                self.blocked = True
            case commands.Connection.Unblocked():
                self.blocked = False
            case _:
                self._on_answer(method)

    def _on_answer(self, found: Any) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_result(found)

    # --- methods with an answer ------------------------------------------------------------------------

    async def call(self, command: Frame) -> Any:
        """Send a method on the channel and return its answer. Raises :class:`ConnectionLost`."""
        return await self._call(command)

    async def consume(
        self, queue: str, on_delivered: OnDelivered, *, prefetch: int, no_ack: bool, exclusive: bool
    ) -> str:
        """Start a consumer and return its tag."""
        await self._call(commands.Basic.Qos(0, prefetch, False))
        # Choose the consumer's tag here. If the broker chose it, the first deliveries could arrive together
        # with the answer, before this connection knows the tag.
        self._consumers_begun += 1
        tag = f"c{self._consumers_begun}"
        self._consumers[tag] = on_delivered
        await self._call(commands.Basic.Consume(0, queue, tag, False, no_ack, exclusive))
        return tag

    async def cancel(self, consumer_tag: str) -> None:
        """Stop a consumer. Deliveries can still arrive until this method returns."""
        await self._call(commands.Basic.Cancel(consumer_tag))
        self._consumers.pop(consumer_tag, None)

    async def _call(self, command: Frame, *, channel: int = CHANNEL) -> Any:
        # Shield the call from a cancellation of the caller. The answer to the call arrives anyway. Without
        # the shield, the next call would get this answer instead of its own.
        call = asyncio.ensure_future(self._exchange(command, channel))
        call.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(call)

    async def _exchange(self, command: Frame, channel: int) -> Any:
        async with self._one_at_a_time:
            answer = self._expect()
            self._send(command, channel=channel)
            return await answer

    def _expect(self) -> asyncio.Future[Any]:
        if self.ended.done():
            raise ConnectionLost(self.ended.result())
        self._answer = self._loop.create_future()
        return self._answer

    # --- methods without an answer ---------------------------------------------------------------------

    def publish(
        self,
        pieces: Sequence[wire.Buffer],
        exchange: str,
        routing_key: str,
        *,
        mandatory: bool,
        properties: Properties,
        gather: bool = False,
    ) -> asyncio.Future[None] | None:
        """Write a message that consists of ``pieces``.

        In confirm mode, return a future. It is done when the broker has confirmed the message, or it raises
        :class:`NotTaken` or :class:`ConnectionLost`. Without confirm mode, return None.

        With ``gather``, collect a small message, and send it at the end of this turn of the event loop. All
        bytes that were collected until then are sent in one write. A large message is not collected. The
        calling code must not change the pieces afterwards, because this method does not always copy them.

        Raise :class:`Congested` while more than ``MAX_UNSENT`` bytes wait for a slow broker. Acks and other
        methods are written even then.
        """
        if self.ended.done():
            raise ConnectionLost(self.ended.result())
        if self._slow:
            self._check_room()
        if self._confirms and mandatory:
            # If the broker returns the message, basic.return contains this id and shows which message it was.
            properties = properties._replace(message_id=str(self._published + 1))
        parts = wire.publish(
            CHANNEL,
            exchange.encode(),
            routing_key.encode(),
            mandatory=mandatory,
            properties=properties,
            pieces=pieces,
            frame_max=self._frame_max,
        )
        confirm = None
        # Count the message after wire.publish, which can raise an error. The broker counts only messages that
        # it gets, and both counts must agree.
        if self._confirms:
            self._published += 1
            confirm = self._open[self._published] = self._loop.create_future()
        small = sum(map(len, pieces)) < SCATTER
        if gather and small:
            self._gather()
        elif gather:
            self.release()
        if small or self.held is not None:
            self.write(b"".join(parts))
        elif self._transport is not None:
            self._transport.writelines(parts)
        return confirm

    def _gather(self) -> None:
        """Collect the bytes that are written until the end of this turn of the event loop.

        Then send them in one write. If ``MOST_GATHERED`` messages are already collected, send those first.
        """
        if self.held is not None and len(self.held) >= MOST_GATHERED:
            self.release()
        if self.held is None:
            self.hold()
            self._loop.call_soon(self.release)

    def _check_room(self) -> None:
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        if unsent > MAX_UNSENT:
            raise Congested(f"RabbitMQ does not read: {unsent} bytes wait to be sent")

    def ack(self, tag: int, multiple: bool) -> None:
        """Ack a delivery. With ``multiple``, ack all earlier unacked deliveries, too."""
        if self.ended.done():
            raise ConnectionLost(self.ended.result())
        self.write(wire.ack(CHANNEL, tag, multiple))

    def nack(self, tag: int) -> None:
        """Nack a delivery, so that it returns to its queue."""
        if self.ended.done():
            raise ConnectionLost(self.ended.result())
        self._send(commands.Basic.Nack(tag, False, True))

    def _send(self, command: Frame, *, channel: int = CHANNEL) -> None:
        self.write(wire.method(channel, command))

    def hold(self) -> None:
        """Collect the bytes that are written from now on. :meth:`release` sends them."""
        if self.held is None:
            self.held = []

    def release(self) -> None:
        """Send the held bytes in one write. If the connection has ended, drop them."""
        held, self.held = self.held, None
        if held and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(held))

    def write(self, data: bytes) -> None:
        """Write whole frames to the socket.

        Between :meth:`hold` and :meth:`release`, collect them instead.
        """
        if self.held is not None:
            self.held.append(data)
        elif self._transport is not None:
            self._transport.write(data)

    def _pulse(self) -> None:
        """Send a heartbeat, or end the connection.

        End the connection if the broker has sent nothing for two heartbeat intervals. Otherwise send a
        heartbeat, and run this method again after half an interval.
        """
        if self._loop.time() - self._heard_at > 2 * self._heartbeat_s:
            self.abort(f"the broker sent nothing for {2 * self._heartbeat_s} s")
            return
        self.write(wire.HEARTBEAT_FRAME)
        self._beat = self._loop.call_later(self._heartbeat_s / 2, self._pulse)
