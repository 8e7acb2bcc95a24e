"""What an AMQP connection writes to its socket, and in how many writes."""

from __future__ import annotations

import asyncio

import pytest

from tidegate.kernel.broker.amqp import wire
from tidegate.kernel.broker.amqp.channel import AmqpChannel
from tidegate.kernel.broker.amqp.connection import CHANNEL, MOST_GATHERED, SCATTER, AmqpConnection

pytestmark = pytest.mark.unit


class RecordingTransport(asyncio.Transport):
    """A socket that records its writes."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.aborted = False

    def write(self, data) -> None:
        assert not self.aborted
        self.writes.append(bytes(data))

    def writelines(self, list_of_data) -> None:
        self.write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
async def transport() -> RecordingTransport:
    return RecordingTransport()


@pytest.fixture
async def connection(transport) -> AmqpConnection:
    found = AmqpConnection(heartbeat_s=60)
    found.connection_made(transport)
    return found


@pytest.fixture
async def channel(connection) -> AmqpChannel:
    return AmqpChannel(connection)


async def publish_all(channel: AmqpChannel, bodies: list[bytes]) -> None:
    await asyncio.gather(*(channel.publish(body, routing_key="q") for body in bodies))
    await asyncio.sleep(0)


def order(written: bytes, parts: list[bytes]) -> list[bytes]:
    return sorted(parts, key=written.index)


async def test_messages_of_one_turn_leave_in_one_write(transport, channel):
    bodies = [b"job 1", b"job 2", b"job 3"]
    await publish_all(channel, bodies)
    (written,) = transport.writes
    assert order(written, bodies) == bodies


async def test_messages_of_two_turns_leave_in_two_writes(transport, channel):
    await publish_all(channel, [b"first"])
    await publish_all(channel, [b"second"])
    first, second = transport.writes
    assert b"first" in first
    assert b"second" in second


async def test_what_is_written_after_a_message_leaves_after_it(transport, channel):
    await channel.publish(b"small", routing_key="q")
    channel.ack(7)
    large = b"x" * SCATTER
    channel.send(large, routing_key="q")
    assert transport.writes == []
    await asyncio.sleep(0)
    written = b"".join(transport.writes)
    parts = [b"small", wire.ack(CHANNEL, 7, False), large]
    assert order(written, parts) == parts


async def test_a_large_message_is_not_held(transport, channel):
    large = b"x" * SCATTER
    await channel.publish(b"small", routing_key="q")
    await channel.publish(large, routing_key="q")
    written = b"".join(transport.writes)
    assert order(written, [b"small", large]) == [b"small", large]


async def test_a_message_without_a_waiting_caller_leaves_immediately(transport, channel):
    channel.send(b"reply", routing_key="q")
    assert len(transport.writes) == 1


async def test_a_cork_sends_the_messages_of_the_turn_too(transport, channel):
    await channel.publish(b"before", routing_key="q")
    with channel.cork():
        channel.send(b"within", routing_key="q")
    (written,) = transport.writes
    assert order(written, [b"before", b"within"]) == [b"before", b"within"]
    await asyncio.sleep(0)
    assert len(transport.writes) == 1


async def test_many_messages_of_one_turn_leave_in_several_writes(transport, channel):
    bodies = [b"job %04d" % number for number in range(MOST_GATHERED + 1)]
    await publish_all(channel, bodies)
    assert len(transport.writes) == 2
    assert order(b"".join(transport.writes), bodies) == bodies


async def test_an_abort_sends_what_was_published_before(transport, channel, connection):
    await channel.publish(b"last", routing_key="q")
    connection.abort("closed")
    assert b"last" in b"".join(transport.writes)
    await asyncio.sleep(0)
    assert len(transport.writes) == 1


async def test_a_lost_connection_drops_what_was_not_sent(transport, channel, connection):
    await channel.publish(b"lost", routing_key="q")
    transport.abort()
    connection.connection_lost(None)
    await asyncio.sleep(0)
    assert transport.writes == []
