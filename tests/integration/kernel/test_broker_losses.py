"""Connections to RabbitMQ come back after a loss and run their setup again, with both drivers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from tests.conftest import PATIENCE_S
from tests.integration.kernel.broker_peers import Inbox, channel_of, nothing
from tidegate.kernel.broker import connection as broker
from tidegate.kernel.broker.connection import Channel, Delivery
from tidegate.kernel.broker.topology import (
    EVENTS,
    Queue,
    requests_queue,
)
from tidegate.kernel.errors import Unavailable

pytestmark = pytest.mark.integration


async def test_a_connection_says_why_it_is_down(make, line, until):
    connection = make(line.url, "test", nothing)
    assert connection.problem == "RabbitMQ is not connected yet."
    await line.down()
    async with connection:
        await until(lambda: connection.problem != "RabbitMQ is not connected yet.")
        assert connection.channel is None
        with pytest.raises(Unavailable, match="RabbitMQ"):
            await connection.wait_up(0.01)
        await line.up()
        await connection.wait_up(PATIENCE_S)
        assert connection.problem is None


async def test_everything_comes_back_after_a_broken_connection(connect, line, queue, until):
    inbox = Inbox(queue)
    seen: list[str] = []
    connection = await connect(
        inbox.setup, line.url, on_down=lambda: seen.append("down"), on_up=lambda: seen.append("up")
    )
    out = channel_of(await connect())
    before = connection.channel
    for round_ in range(4):
        await out.publish(b"%d" % round_, routing_key=queue.name)
        await until(lambda round_=round_: b"%d" % round_ in inbox.bodies)
        if round_ < 3:
            line.cut()
            await until(lambda round_=round_: seen == ["up", "down"] * (round_ + 1) + ["up"])
            await connection.wait_up(PATIENCE_S)
    # An ack may be lost with the line. Then its message is delivered again.
    assert list(dict.fromkeys(inbox.bodies)) == [b"0", b"1", b"2", b"3"]
    assert inbox.setups == 4
    assert connection.channel is not before
    assert connection.problem is None


async def test_an_unacked_message_is_delivered_again(connect, line, queue, until):
    inbox = Inbox(queue, ack=False)
    await connect(inbox.setup, line.url)
    await channel_of(await connect()).publish(b"x", routing_key=queue.name)
    await until(lambda: len(inbox.got) == 1)
    line.cut()
    await until(lambda: len(inbox.got) == 2)
    assert [d.redelivered for d in inbox.got] == [False, True]


async def test_a_deleted_queue_comes_back_with_its_consumer(connect, queue, until):
    """The broker cancels the consumer, and only the connection notices."""
    inbox = Inbox(queue)
    await connect(inbox.setup)
    out = channel_of(await connect())
    await out.delete(queue)
    await until(lambda: inbox.setups == 2)

    async def arrives() -> bool:
        await out.publish(b"again", routing_key=queue.name)
        return bool(inbox.got)

    await until(arrives)


async def test_a_setup_that_fails_is_tried_again(make, rabbitmq_url, queue, until):
    attempts = 0

    async def setup(channel: Channel) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            # The broker closes the channel, because the queue does not exist.
            await channel.consume(queue, lambda _: nothing(channel), prefetch=1)

    async with make(rabbitmq_url, "test", setup) as connection:
        await connection.wait_up(PATIENCE_S)
    assert attempts == 3


async def test_a_channel_error_brings_a_new_channel(connect, queue, fresh, until):
    connection = await connect()
    channel = channel_of(connection)
    with contextlib.suppress(Unavailable):
        await channel.publish(b"x", exchange=fresh("no-such-exchange"), routing_key="")
    await until(lambda: connection.channel is not None and connection.channel is not channel)
    await channel_of(connection).declare(queue)


async def test_an_ack_of_an_unknown_delivery_brings_a_new_channel(connect, until):
    connection = await connect()
    channel = channel_of(connection)
    channel.ack(999)
    await until(lambda: connection.channel is not None and connection.channel is not channel)


async def test_publishes_in_flight_fail_when_the_connection_is_lost(connect, line, queue):
    connection = await connect(url=line.url)
    channel = channel_of(connection)
    await channel.declare(queue)
    tasks = [asyncio.create_task(channel.publish(bytes(50_000), routing_key=queue.name)) for _ in range(50)]
    await asyncio.sleep(0)
    line.cut()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert any(isinstance(result, Unavailable) for result in results)
    assert all(result is None or isinstance(result, Unavailable) for result in results)


async def _use(channel: Channel, queue: Queue) -> dict[str, Callable]:
    return {
        "declare": lambda: channel.declare(queue),
        "bind": lambda: channel.bind(queue, EVENTS, "x"),
        "depth": lambda: channel.depth(queue),
        "delete": lambda: channel.delete(queue),
        "consume": lambda: channel.consume(queue, lambda _: nothing(channel), prefetch=1),
        "cancel": lambda: channel.cancel("some-consumer"),
        "ack": lambda: channel.ack(1),
        "publish": lambda: channel.publish(b"x", routing_key=queue.name),
    }


@pytest.mark.parametrize(
    "operation", ["declare", "bind", "depth", "delete", "consume", "cancel", "ack", "publish"]
)
async def test_every_call_on_an_ended_channel_is_unavailable(connect, line, queue, until, operation):
    """Every operation raises the same kind of error."""
    connection = await connect(url=line.url)
    channel = channel_of(connection)
    await line.down()
    await until(lambda: connection.channel is None)
    with pytest.raises(Unavailable):
        await (await _use(channel, queue))[operation]()


@pytest.mark.parametrize("turns", range(6))
async def test_the_answer_of_a_cancelled_call_is_not_the_next_calls(connect, queue, fresh, turns, until):
    """The answer still arrives, and must not count as the answer to the next call."""
    connection = await connect()
    channel = channel_of(connection)
    await channel.declare(queue)
    for _ in range(3):
        await channel.publish(b"x", routing_key=queue.name)
    task = asyncio.create_task(channel.depth(requests_queue(fresh("empty"))))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    try:
        depths = [await channel.depth(queue) for _ in range(3)]
    except Unavailable:
        await until(
            lambda: connection.channel not in (None, channel), "a session that cannot tell is replaced"
        )
        depths = [await channel_of(connection).depth(queue)]
    assert set(depths) == {3}


async def test_a_delivery_that_cannot_be_handled_does_not_end_the_channel(connect, queue, until):
    """It stays unacked, and later deliveries are handled on the same channel."""
    got: list[bytes] = []

    async def setup(channel: Channel) -> None:
        def on_delivery(delivery: Delivery) -> None:
            if delivery.body == b"poison":
                raise ValueError("not this one")
            got.append(bytes(delivery.body))
            channel.ack(delivery.tag)

        await channel.declare(queue)
        await channel.consume(queue, on_delivery, prefetch=10)

    connection = await connect(setup)
    channel = connection.channel
    sender = channel_of(await connect())
    for body in (b"poison", b"good", b"better"):
        await sender.publish(body, routing_key=queue.name)
    await until(lambda: got == [b"good", b"better"])
    assert connection.channel is channel
    await connection.stop()
    inbox = Inbox(queue)
    await connect(inbox.setup)
    await until(lambda: inbox.bodies == [b"poison"], "the broker has it still")


async def test_what_was_written_before_the_stop_arrives(connect, queue, until, monkeypatch):
    """Messages without confirms, and more of them than a socket takes at once."""
    connection = await connect(confirms=False)
    channel = channel_of(connection)
    await channel.declare(queue)
    body = bytes(200_000)
    for _ in range(25):
        channel.send(body, routing_key=queue.name)
    monkeypatch.setattr(broker, "CLOSE_TIMEOUT_S", PATIENCE_S)  # a busy machine may need longer
    await connection.stop()
    inbox = Inbox(queue)
    await connect(inbox.setup)
    await until(lambda: len(inbox.got) == 25)


async def test_stopping_does_not_wait_for_a_broker_that_is_away(connect, line, until, monkeypatch):
    monkeypatch.setattr(broker, "CLOSE_TIMEOUT_S", 3600.0)
    connection = await connect(url=line.url)
    await line.down()
    await until(lambda: connection.channel is None)
    async with asyncio.timeout(PATIENCE_S):
        await connection.stop()
        await connection.stop()
