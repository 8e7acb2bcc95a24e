"""Declare, publish and consume at RabbitMQ, with both drivers."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.kernel.broker_peers import Inbox, channel_of
from tidegate.kernel.broker.connection import Channel, Delivery, Refused, Unroutable
from tidegate.kernel.broker.topology import (
    EVENTS,
    Queue,
    cancels_queue,
    events_queue,
    replica_queue,
    replies_queue,
    requests_queue,
)
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.llm import BAND_WEIGHTS

pytestmark = pytest.mark.integration


async def test_a_message_arrives_as_it_was_sent(connect, queue, until):
    inbox = Inbox(queue)
    await connect(inbox.setup)
    out = channel_of(await connect())
    await out.publish(
        b"body",
        routing_key=queue.name,
        reply_to="here",
        headers={"cause": "x"},
        mandatory=True,
        persistent=True,
    )
    await out.publish(b"", routing_key=queue.name)
    await until(lambda: len(inbox.got) == 2)
    first, second = inbox.got
    assert (first.body, first.reply_to, first.headers) == (b"body", "here", {"cause": "x"})
    assert (first.redelivered, first.routing_key, first.exchange) == (False, queue.name, "")
    assert (second.body, second.reply_to, second.headers) == (b"", None, {})
    assert second.tag > first.tag


@pytest.mark.parametrize("size", [3_072_000, 16 * 2**20], ids=["3 MB", "the largest that RabbitMQ takes"])
async def test_a_large_message(connect, queue, until, size):
    inbox = Inbox(queue)
    await connect(inbox.setup)
    body = bytes(range(256)) * (size // 256)
    await channel_of(await connect()).publish(body, routing_key=queue.name)
    await until(lambda: inbox.bodies == [body])


@pytest.mark.parametrize("left_ms", [0, -5, 0.4])
async def test_an_expiration_below_one_does_not_close_the_channel(connect, queue, left_ms):
    connection = await connect()
    channel = channel_of(connection)
    await channel.declare(queue)
    await channel.publish(b"late", routing_key=queue.name, expiration_ms=left_ms)
    await channel.publish(b"kept", routing_key=queue.name, expiration_ms=60_000)
    assert connection.channel is channel


async def test_an_expiration_of_years_does_not_close_the_channel(connect, queue, until):
    connection = await connect()
    channel = channel_of(connection)
    inbox = Inbox(queue)
    await connect(inbox.setup)
    await channel.publish(b"some day", routing_key=queue.name, expiration_ms=10 * 366 * 86_400_000)
    await until(lambda: inbox.bodies == [b"some day"])
    assert connection.channel is channel


async def test_an_expired_message_is_not_delivered(connect, queue, until):
    channel = channel_of(await connect())
    await channel.declare(queue)
    await channel.publish(b"late", routing_key=queue.name, expiration_ms=1)
    await until(lambda: _depth_is(channel, queue, 0))
    inbox = Inbox(queue)
    await connect(inbox.setup)
    await channel.publish(b"in time", routing_key=queue.name, expiration_ms=60_000)
    await until(lambda: inbox.got)
    assert inbox.bodies == [b"in time"]


async def _depth_is(channel: Channel, queue: Queue, expected: int) -> bool:
    return await channel.depth(queue) == expected


async def test_a_mandatory_message_without_a_queue_is_returned(connect, queue):
    connection = await connect()
    channel = channel_of(connection)
    with pytest.raises(Unroutable, match="No queue for") as caught:
        await channel.publish(b"x", routing_key=queue.name, mandatory=True)
    assert isinstance(caught.value, Unavailable)
    await channel.publish(b"x", routing_key=queue.name)
    await channel.declare(queue)
    await channel.publish(b"x", routing_key=queue.name, mandatory=True)
    assert connection.channel is channel


async def test_a_full_queue_refuses_a_message(connect, fresh):
    full = Queue(fresh("full"), {"x-max-length": 1, "x-overflow": "reject-publish"})
    connection = await connect()
    channel = channel_of(connection)
    await channel.declare(full)
    await channel.publish(b"one", routing_key=full.name)
    results = await asyncio.gather(
        *(channel.publish(b"more", routing_key=full.name) for _ in range(3)), return_exceptions=True
    )
    assert any(isinstance(result, Refused) for result in results)
    assert all(result is None or isinstance(result, Refused) for result in results)
    assert connection.channel is channel
    await channel.delete(full)


async def test_a_failure_after_sending_is_reported(connect, queue, until):
    channel = channel_of(await connect())
    failures: list[Unavailable] = []
    channel.send(b"x", routing_key=queue.name, mandatory=True, on_failure=failures.append)
    await until(lambda: failures)
    assert isinstance(failures[0], Unroutable)
    await channel.declare(queue)
    channel.send(b"x", routing_key=queue.name, mandatory=True, on_failure=failures.append)
    await until(lambda: _depth_is(channel, queue, 1))
    assert len(failures) == 1


async def test_a_body_in_pieces_arrives_whole(connect, queue, until):
    inbox = Inbox(queue)
    await connect(inbox.setup)
    channel = channel_of(await connect())
    pieces = [bytes([number]) * 50_000 for number in range(5)]
    with channel.cork():
        channel.send(pieces, routing_key=queue.name)
        channel.send([b"small", memoryview(b" pieces")], routing_key=queue.name)
    await until(lambda: inbox.bodies == [b"".join(pieces), b"small pieces"])


async def test_a_nacked_message_is_delivered_again(connect, queue, until):
    inbox = Inbox(queue, ack=False)
    channel = channel_of(await connect(inbox.setup))
    await channel.publish(b"x", routing_key=queue.name)
    await until(lambda: len(inbox.got) == 1)
    channel.nack(inbox.got[0].tag)
    await until(lambda: len(inbox.got) == 2)
    assert [delivery.redelivered for delivery in inbox.got] == [False, True]


async def test_what_is_sent_before_an_ack_arrives_before_it(connect, queue, fresh, until):
    """When a delivery is acked, the answer that was sent before is in its queue."""
    answers = requests_queue(fresh("answers"))
    watching = channel_of(await connect())
    await watching.declare(answers)

    async def setup(channel: Channel) -> None:
        def on_delivery(delivery: Delivery) -> None:
            channel.send(bytes(100_000), routing_key=answers.name)
            channel.ack(delivery.tag)

        await channel.declare(queue)
        await channel.consume(queue, on_delivery, prefetch=1)

    await connect(setup, confirms=False)
    for _ in range(50):
        await watching.publish(b"x", routing_key=queue.name)
    # With a prefetch of one, each delivery follows the ack of the previous one.
    await until(lambda: _depth_is(watching, answers, 50))


async def test_acks_leave_in_order(connect, queue, until):
    """An ack after a ``multiple`` one would be for a delivery that is acked already."""
    inbox = Inbox(queue, ack=False)
    connection = await connect(inbox.setup)
    channel = channel_of(connection)
    for number in range(100):
        await channel.publish(b"%d" % number, routing_key=queue.name)
    await until(lambda: len(inbox.got) == 100)
    tags = [delivery.tag for delivery in inbox.got]
    for first, last in zip(tags[::2], tags[1::2], strict=True):
        channel.send(b"", routing_key="nowhere")
        channel.ack(first)
        channel.ack(last, multiple=True)
    assert await channel.depth(queue) == 0
    assert connection.channel is channel


async def test_a_thousand_publishes_at_once(connect, queue, until):
    """All are confirmed. Each publisher of an unroutable message gets the error, and no other publisher."""
    inbox = Inbox(queue, no_ack=True)
    await connect(inbox.setup)
    channel = channel_of(await connect())

    async def publish(number: int) -> bool:
        known = number % 10 != 0
        key = queue.name if known else f"{queue.name}-nowhere"
        try:
            await channel.publish(b"%d" % number, routing_key=key, mandatory=True)
        except Unroutable:
            return not known
        return known

    assert all(await asyncio.gather(*(publish(n) for n in range(1000))))
    await until(lambda: len(inbox.got) == 900)
    assert inbox.bodies == [b"%d" % n for n in range(1000) if n % 10], "in the order of publishing"


async def test_without_confirms_publishing_returns_at_once(connect, queue, until):
    inbox = Inbox(queue)
    await connect(inbox.setup)
    channel = channel_of(await connect(confirms=False))
    for number in range(10):
        await channel.publish(b"%d" % number, routing_key=queue.name)
    await until(lambda: len(inbox.got) == 10)


async def test_many_large_messages_at_once_are_all_taken(connect, queue, until):
    """80 MiB are published in one turn of the event loop, and a broker that reads takes them all."""
    inbox = Inbox(queue)
    await connect(inbox.setup)
    channel, body = channel_of(await connect()), bytes(2 * 2**20)
    await asyncio.gather(*(channel.publish(body, routing_key=queue.name) for _ in range(40)))
    await until(lambda: len(inbox.got) == 40)


async def test_prefetch_bounds_what_is_held(connect, queue, until):
    channel = channel_of(await connect())
    await channel.declare(queue)
    for _ in range(5):
        await channel.publish(b"x", routing_key=queue.name)
    inbox = Inbox(queue, ack=False, prefetch=2)
    consuming = channel_of(await connect(inbox.setup))
    await until(lambda: _depth_is(channel, queue, 3))
    await until(lambda: len(inbox.got) == 2)
    assert await channel.depth(queue) == 3
    consuming.ack(inbox.got[1].tag, multiple=True)
    await until(lambda: len(inbox.got) == 4)


async def test_depth_is_what_waits(connect, queue):
    channel = channel_of(await connect())
    assert await channel.depth(queue) == 0
    for _ in range(3):
        await channel.publish(b"x", routing_key=queue.name)
    assert await channel.depth(queue) == 3


async def test_a_cancelled_consumer_keeps_what_it_holds(connect, queue, until):
    got: list[Delivery] = []

    async def keep(delivery: Delivery) -> None:
        got.append(delivery)

    channel = channel_of(await connect())
    await channel.declare(queue)
    consumer = await channel.consume(queue, keep, prefetch=10)
    await channel.publish(b"one", routing_key=queue.name)
    await until(lambda: got)
    await channel.cancel(consumer)
    await channel.publish(b"two", routing_key=queue.name)
    assert await channel.depth(queue) == 1
    channel.ack(got[0].tag)
    await channel.consume(queue, keep, prefetch=10)
    await until(lambda: [d.body for d in got] == [b"one", b"two"])
    assert not got[1].redelivered


async def test_messages_are_taken_one_by_one(connect, queue):
    channel = channel_of(await connect())
    await channel.declare(queue)
    assert await channel.get(queue) is None
    large = bytes(range(256)) * 2000
    for body in (b"", b"small", large):
        await channel.publish(body, routing_key=queue.name, reply_to="r", headers={"x": 1})
    found = [await channel.get(queue) for _ in range(4)]
    assert [each and each.body for each in found] == [b"", b"small", large, None]
    assert found[1] is not None
    assert (found[1].reply_to, found[1].headers, found[1].routing_key) == ("r", {"x": 1}, queue.name)
    assert not found[1].redelivered


async def test_a_taken_message_is_delivered_again_after_its_channel_ended(connect, queue, until):
    taker = await connect()
    channel = channel_of(taker)
    await channel.declare(queue)
    for body in (b"kept", b"settled"):
        await channel.publish(body, routing_key=queue.name)
    first, second = await channel.get(queue), await channel.get(queue)
    assert first is not None
    assert second is not None
    channel.ack(second.tag)
    await channel.depth(queue)  # the broker has read the ack
    await taker.stop()
    other = channel_of(await connect())
    await until(lambda: _depth_is(other, queue, 1))
    again = await other.get(queue)
    assert again is not None
    assert (again.body, again.redelivered) == (b"kept", True)


async def test_taking_beside_a_consumer(connect, queue, fresh, until):
    other = requests_queue(fresh("other"))
    inbox = Inbox(queue)
    channel = channel_of(await connect(inbox.setup))
    await channel.declare(other)
    for number in range(50):
        await channel.publish(b"%d" % number, routing_key=other.name)
        await channel.publish(b"%d" % number, routing_key=queue.name)
    found = await asyncio.gather(*(channel.get(other) for _ in range(51)))
    assert [each.body for each in found if each] == [b"%d" % number for number in range(50)]
    await until(lambda: inbox.bodies == [b"%d" % number for number in range(50)])


async def test_taking_from_a_missing_queue_ends_the_channel(connect, queue):
    with pytest.raises(Unavailable, match="NOT_FOUND"):
        await channel_of(await connect()).get(queue)


async def test_an_expired_message_moves_to_the_shared_queue(connect, fresh):
    """A request waits in its replica's queue for a limited time. Then any worker may take it."""
    deployment = fresh("d")
    for band in BAND_WEIGHTS:
        shared, own = requests_queue(deployment, band), replica_queue(deployment, "d-0-1", band)
        channel = channel_of(await connect())
        await channel.declare(shared)
        await channel.declare(own)
        await channel.publish(b"x", routing_key=own.name, expiration_ms=20, reply_to="r", mandatory=True)
        while (moved := await channel.get(shared)) is None:
            await asyncio.sleep(0.01)
        assert (moved.body, moved.reply_to, moved.redelivered) == (b"x", "r", False)
        assert moved.headers["x-death"][0]["reason"] == "expired"
        await channel.delete(own)


async def test_events_reach_everybody_who_listens(connect, fresh, until):
    inboxes = [Inbox(events_queue("test", fresh("i")), no_ack=True) for _ in range(2)]
    for inbox, key in zip(inboxes, ("demand.*", "registry.changed"), strict=True):

        async def setup(channel: Channel, inbox=inbox, key=key) -> None:
            await inbox.setup(channel)
            await channel.declare(EVENTS)
            await channel.bind(inbox.queue, EVENTS, key)

        await connect(setup)
    channel = channel_of(await connect())
    await channel.publish(b"a", exchange=EVENTS.name, routing_key="demand.a")
    await channel.publish(b"b", exchange=EVENTS.name, routing_key="registry.changed")
    await channel.publish(b"c", exchange=EVENTS.name, routing_key="demand.c")
    await until(lambda: len(inboxes[0].got) == 2 and inboxes[1].got)
    assert (inboxes[0].bodies, inboxes[1].bodies) == ([b"a", b"c"], [b"b"])
    assert inboxes[0].got[0].routing_key == "demand.a"


async def test_an_exclusive_queue_goes_with_its_connection(connect, fresh, until):
    queue = cancels_queue(fresh("r"), "i")
    inbox = Inbox(queue, no_ack=True)
    connection = await connect(inbox.setup)
    channel = channel_of(await connect())
    await channel.publish(b"x", routing_key=queue.name, mandatory=True)
    await connection.stop()

    async def gone() -> bool:
        try:
            await channel.publish(b"x", routing_key=queue.name, mandatory=True)
        except Unroutable:
            return True
        return False

    await until(gone)


async def test_an_exclusive_consumer_is_alone(connect, make, rabbitmq_url, fresh, until):
    queue = replies_queue(fresh("g"))
    first = Inbox(queue, exclusive=True)
    await connect(first.setup)
    async with make(rabbitmq_url, "second", Inbox(queue).setup) as second:
        await until(lambda: "ACCESS_REFUSED" in (second.problem or ""))
        with pytest.raises(Unavailable, match="ACCESS_REFUSED"):
            await second.wait_up(0.01)
