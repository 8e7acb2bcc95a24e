"""A hostile broker: the connection ends with a reason, and memory stays within limits."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from pamqp import commands, frame
from pamqp.common import FieldTable

from tidegate.kernel.broker import aio_pika_channel
from tidegate.kernel.broker.aio_pika_channel import open_channel as open_aio_pika_channel
from tidegate.kernel.broker.amqp import connection as amqp
from tidegate.kernel.broker.amqp import wire
from tidegate.kernel.broker.amqp.channel import AmqpChannel
from tidegate.kernel.broker.amqp.channel import open_channel as open_fast_channel
from tidegate.kernel.broker.amqp.connection import AmqpConnection
from tidegate.kernel.broker.channel import DriverChannel, Refused
from tidegate.kernel.errors import Unavailable

pytestmark = pytest.mark.integration

FRAME_MAX = 131_072
MIB = 2**20


class Hostile:
    """A broker that does the handshake, then sends what a test wants, or does not read."""

    def __init__(self) -> None:
        self.writer: asyncio.StreamWriter | None = None
        self.reader: asyncio.StreamReader | None = None
        self.before: bytes | None = None
        self.tune = FRAME_MAX
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        await reader.readexactly(8)
        if self.before is not None:
            writer.write(self.before)
            return
        capabilities: FieldTable = {"publisher_confirms": True, "basic.nack": True}
        self.send(commands.Connection.Start(0, 9, {"capabilities": capabilities}, "PLAIN", "en_US"), 0)
        await self._heard(commands.Connection.StartOk)
        self.send(commands.Connection.Tune(1, self.tune, 0), 0)
        await self._heard(commands.Connection.Open)
        self.send(commands.Connection.OpenOk(), 0)
        await self._heard(commands.Channel.Open)
        self.send(commands.Channel.OpenOk())
        await self._heard(commands.Confirm.Select)
        self.send(commands.Confirm.SelectOk())

    def send(self, method, channel: int = 1) -> None:
        assert self.writer is not None
        self.writer.write(frame.marshal(method, channel))

    async def _heard(self, kind: type) -> None:
        assert self.reader is not None
        while True:
            head = await self.reader.readexactly(7)
            (size,) = struct.unpack(">I", head[3:])
            rest = await self.reader.readexactly(size + 1)
            if isinstance(frame.unmarshal(head + rest)[2], kind):
                return


@pytest.fixture
async def hostile() -> AsyncIterator[Hostile]:
    peer = Hostile()
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    peer.port = server.sockets[0].getsockname()[1]
    yield peer
    server.close()
    if peer.writer is not None:
        peer.writer.close()


@pytest.fixture
async def connect(hostile) -> AsyncIterator[Callable[[], Awaitable[AmqpConnection]]]:
    async with contextlib.AsyncExitStack() as stack:

        async def opened() -> AmqpConnection:
            found = await amqp.connect(
                f"amqp://127.0.0.1:{hostile.port}/", name="test", heartbeat_s=60, confirms=True
            )
            stack.callback(found.abort, "the test is over")
            return found

        yield opened


def of(kind: int, payload: bytes, channel: int = 1) -> bytes:
    return wire._HEAD.pack(kind, channel, len(payload)) + payload + b"\xce"


def method(class_id: int, method_id: int, arguments: bytes) -> bytes:
    return of(wire.METHOD, struct.pack(">HH", class_id, method_id) + arguments)


def header(size: int, flags: int = 0, values: bytes = b"") -> bytes:
    return of(wire.HEADER, struct.pack(">HHQH", 60, 0, size, flags) + values)


DELIVER = frame.marshal(commands.Basic.Deliver("c1", 7, False, "", "q"), 1)


async def test_a_frame_above_the_negotiated_size_ends_the_connection(hostile, connect):
    """The frame's head is enough to end the connection."""
    found = await connect()
    hostile.writer.write(wire._HEAD.pack(wire.METHOD, 1, FRAME_MAX - 7))
    reason = await asyncio.wait_for(asyncio.shield(found.ended), 20)
    assert f"a frame of {FRAME_MAX + 1} bytes; the agreed limit is {FRAME_MAX}" in reason


async def test_a_body_frame_above_the_negotiated_size_does_too(hostile, connect):
    found = await connect()
    hostile.writer.write(DELIVER + header(4 * MIB) + wire._HEAD.pack(wire.BODY, 1, 2 * MIB))
    reason = await asyncio.wait_for(asyncio.shield(found.ended), 20)
    assert f"the agreed limit is {FRAME_MAX}" in reason


async def test_a_frame_of_4_gib_in_the_handshake(hostile, connect):
    hostile.before = wire._HEAD.pack(wire.METHOD, 0, 2**32 - 1)
    with pytest.raises(amqp.ConnectionLost, match="a frame of 4294967303 bytes; the agreed limit is 1048576"):
        await asyncio.wait_for(connect(), 20)


@pytest.mark.parametrize("tuned", [0, 2**31], ids=["no limit", "a high limit"])
async def test_the_limit_is_ours_where_the_broker_names_none(hostile, connect, tuned):
    hostile.tune = tuned
    found = await connect()
    hostile.writer.write(wire._HEAD.pack(wire.METHOD, 1, MIB))
    assert "the agreed limit is 1048576" in await asyncio.wait_for(asyncio.shield(found.ended), 20)


MALFORMED = {
    "a content above what RabbitMQ takes": DELIVER + header(wire.MOST + 1),
    "a method without its number": of(wire.METHOD, b"\0"),
    "a method that nobody knows": method(60, 999, b""),
    "a deliver that is cut off": method(60, 60, b"\x02c1\0\0"),
    "a deliver whose text is no UTF-8": method(60, 60, b"\x02\xff\xfe" + bytes(9) + b"\0\0"),
    "a deliver whose text reaches past its frame": method(60, 60, b"\x02c1" + bytes(9) + b"\0\xff"),
    "a confirm that is cut off": method(60, 80, b"\0\0"),
    "a return whose message has no number": method(60, 50, b"") + header(0, wire._MESSAGE_ID, b"\x04word"),
    "a header that is cut off": DELIVER + of(wire.HEADER, b"\0\x3c"),
    "a header without a method": header(1),
    "a table that is cut off": DELIVER + header(5, wire._HEADERS, b"\0\0\0\xffabc"),
    "a table of an unknown type": DELIVER + header(5, wire._HEADERS, b"\0\0\0\x04\x01a\x01x"),
    "a table nested ten thousand times": DELIVER
    + header(5, wire._HEADERS, b"\0\0\xf0\0" + b"\x01aF\0\0\xf0\0" * 8000),
    "a second header within a content": DELIVER + header(100) + of(wire.BODY, bytes(50)) + header(100),
    "a message within a content": DELIVER + header(100) + of(wire.BODY, bytes(50)) + DELIVER,
    "a type that nobody knows": of(7, b""),
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_malformed_ends_the_connection_and_nothing_else(hostile, connect, sent):
    raised = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    found = await connect()
    hostile.writer.write(sent)
    reason = await asyncio.wait_for(asyncio.shield(found.ended), 20)
    assert "the broker's frames cannot be read" in reason
    assert len(reason) < 400
    assert raised == []


async def test_a_broker_that_does_not_read_is_not_waited_for_without_a_limit(hostile, connect, monkeypatch):
    monkeypatch.setattr(amqp, "MAX_UNSENT", 8 * MIB)
    found = await connect()
    channel, body = AmqpChannel(found), bytes(MIB)

    async def publish_without_end() -> None:
        while True:
            channel.send(body, routing_key="q")
            await asyncio.sleep(0)

    with pytest.raises(Refused, match="RabbitMQ does not read") as caught:
        await asyncio.wait_for(publish_without_end(), 60)
    assert caught.value.retry_after_s
    assert found._transport.get_write_buffer_size() <= 9 * MIB + 4096
    channel.ack(7)  # acks are still accepted
    with pytest.raises(Refused):
        await channel.publish(b"small", routing_key="q")

    async def drain() -> None:
        while await hostile.reader.read(MIB):
            pass

    draining = asyncio.create_task(drain())
    while found._transport.get_write_buffer_size():
        await asyncio.sleep(0.01)
    channel.send(b"small", routing_key="q")
    draining.cancel()


@pytest.fixture(params=["fast", "aio-pika"])
async def channel(request, hostile) -> AsyncIterator[DriverChannel]:
    """Yield a channel to the hostile broker, with each driver."""
    url = f"amqp://127.0.0.1:{hostile.port}/"
    found: DriverChannel
    if request.param == "fast":
        found = await open_fast_channel(url, name="test", heartbeat_s=60, confirms=True)
    else:
        found = await open_aio_pika_channel(url, name="test", heartbeat_s=60, confirms=True)
    yield found
    found.abort("the test is over")
    await asyncio.wait({asyncio.ensure_future(found.close())}, timeout=5)


async def test_a_blocked_broker_gets_no_messages(hostile, channel, until):
    assert not channel.blocked
    hostile.send(commands.Connection.Blocked("low on memory"), 0)
    await until(lambda: channel.blocked)
    with pytest.raises(Refused, match="short of memory or disk") as caught:
        await channel.publish(b"x", routing_key="q")
    assert caught.value.retry_after_s
    with pytest.raises(Refused):
        channel.send(b"x", routing_key="q")
    channel.ack(1)
    hostile.send(commands.Connection.Unblocked(), 0)
    await until(lambda: not channel.blocked)
    channel.send(b"x", routing_key="q")


async def test_unconfirmed_messages_are_limited(hostile, monkeypatch):
    """aio-pika: the bytes that wait for a broker's confirms have a limit."""
    monkeypatch.setattr(aio_pika_channel, "MAX_UNCONFIRMED", 8 * MIB)
    url = f"amqp://127.0.0.1:{hostile.port}/"
    found = await open_aio_pika_channel(url, name="test", heartbeat_s=60, confirms=True)
    for _ in range(9):
        found.send(bytes(MIB), routing_key="q")
    with pytest.raises(Refused, match="RabbitMQ is too slow") as caught:
        found.send(b"", routing_key="q")
    assert caught.value.retry_after_s
    found.abort("the test is over")
    await found.close()
    assert not found._calls


async def test_a_channel_that_the_broker_closes_says_why(hostile, channel):
    hostile.send(commands.Channel.Close(406, "PRECONDITION_FAILED - a test", 0, 0))
    assert "PRECONDITION_FAILED - a test" in await asyncio.wait_for(asyncio.shield(channel.ended), 20)
    with pytest.raises(Unavailable, match="PRECONDITION_FAILED"):
        channel.ack(1)


async def test_a_connection_that_the_broker_closes_says_why(hostile, channel):
    hostile.send(commands.Connection.Close(320, "CONNECTION_FORCED - a test", 0, 0), 0)
    assert "CONNECTION_FORCED - a test" in await asyncio.wait_for(asyncio.shield(channel.ended), 20)


async def test_a_cancelled_consumer_ends_the_channel(hostile, channel):
    hostile.send(commands.Basic.Cancel("c1", True))
    assert "its queue was deleted" in await asyncio.wait_for(asyncio.shield(channel.ended), 20)
