"""The link to RabbitMQ: what is declared, published and consumed, and that all of it comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from tests.conftest import PATIENCE_S
from tidegate.kernel.broker import connection as broker
from tidegate.kernel.broker.connection import Channel, Connection, Delivery, Unroutable
from tidegate.kernel.broker.topology import (
    EVENTS,
    Queue,
    cancels_queue,
    events_queue,
    replies_queue,
    requests_queue,
)
from tidegate.kernel.errors import Unavailable

pytestmark = pytest.mark.integration


class Inbox:
    """A consumer that keeps what it gets and, unless told otherwise, settles it."""

    def __init__(self, queue: Queue, *, ack: bool = True, **how) -> None:
        self.queue = queue
        self.got: list[Delivery] = []
        self.setups = 0
        self._ack = ack
        self._how = {"prefetch": 100, **how}

    @property
    def bodies(self) -> list[bytes]:
        return [bytes(delivery.body) for delivery in self.got]

    async def setup(self, channel: Channel) -> None:
        async def on_delivery(delivery: Delivery) -> None:
            self.got.append(delivery)
            if self._ack and not self._how.get("no_ack"):
                channel.ack(delivery.tag)

        self.setups += 1
        await channel.declare(self.queue)
        await channel.consume(self.queue, on_delivery, **self._how)


async def nothing(_: Channel) -> None:
    return


@pytest.fixture
async def connect(rabbitmq_url) -> AsyncIterator[Callable]:
    """Opens a link that is up, and stops it after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def opened(setup=nothing, url: str = rabbitmq_url, **how) -> Connection:
            connection = await stack.enter_async_context(Connection(url, "test", setup, **how))
            await connection.wait_up(20)
            return connection

        yield opened


@pytest.fixture
def queue(fresh) -> Queue:
    return requests_queue(fresh("d"))


def channel_of(connection: Connection) -> Channel:
    assert connection.channel is not None
    return connection.channel


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


async def test_a_thousand_publishes_at_once(connect, queue, until):
    """All confirmed; those without a queue are returned to their own publisher and to no other."""
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
    """80 MiB leave in one turn of the loop: a broker that reads is waited for, and refuses none."""
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
    assert len(inbox.got) == 2
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


async def test_an_exclusive_consumer_is_alone(connect, rabbitmq_url, fresh, until):
    queue = replies_queue(fresh("g"))
    first = Inbox(queue, exclusive=True)
    await connect(first.setup)
    async with Connection(rabbitmq_url, "second", Inbox(queue).setup) as second:
        await until(lambda: "ACCESS_REFUSED" in (second.problem or ""))
        with pytest.raises(Unavailable, match="ACCESS_REFUSED"):
            await second.wait_up(0.01)


async def test_a_link_says_why_it_is_down(line, until):
    connection = Connection(line.url, "test", nothing)
    assert connection.problem == "RabbitMQ is not connected yet."
    await line.down()
    async with connection:
        await until(lambda: connection.problem != "RabbitMQ is not connected yet.")
        assert connection.channel is None
        with pytest.raises(Unavailable, match="RabbitMQ"):
            await connection.wait_up(0.01)
        await line.up()
        await connection.wait_up(20)
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
            await connection.wait_up(20)
    # An ack may be lost with the line: then its message comes once more.
    assert list(dict.fromkeys(inbox.bodies)) == [b"0", b"1", b"2", b"3"]
    assert inbox.setups == 4
    assert connection.channel is not before
    assert connection.problem is None


async def test_what_was_unsettled_is_delivered_again(connect, line, queue, until):
    inbox = Inbox(queue, ack=False)
    await connect(inbox.setup, line.url)
    await channel_of(await connect()).publish(b"x", routing_key=queue.name)
    await until(lambda: len(inbox.got) == 1)
    line.cut()
    await until(lambda: len(inbox.got) == 2)
    assert [d.redelivered for d in inbox.got] == [False, True]


async def test_a_deleted_queue_comes_back_with_its_consumer(connect, queue, until):
    """The broker cancels the consumer; nobody else would ever notice."""
    inbox = Inbox(queue)
    await connect(inbox.setup)
    out = channel_of(await connect())
    await out.delete(queue)
    await until(lambda: inbox.setups == 2)

    async def arrives() -> bool:
        await out.publish(b"again", routing_key=queue.name)
        return bool(inbox.got)

    await until(arrives)


async def test_a_setup_that_fails_is_tried_again(connect, rabbitmq_url, queue, until):
    attempts = 0

    async def setup(channel: Channel) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            # The broker closes the channel: the queue is not there.
            await channel.consume(queue, lambda _: nothing(channel), prefetch=1)

    async with Connection(rabbitmq_url, "test", setup) as connection:
        await connection.wait_up(20)
    assert attempts == 3


async def test_a_channel_error_brings_a_new_session(connect, queue, fresh, until):
    connection = await connect()
    channel = channel_of(connection)
    with contextlib.suppress(Unavailable):
        await channel.publish(b"x", exchange=fresh("no-such-exchange"), routing_key="")
    await until(lambda: connection.channel is not None and connection.channel is not channel)
    await channel_of(connection).declare(queue)


async def test_an_ack_of_what_is_not_there_brings_a_new_session(connect, until):
    connection = await connect()
    channel = channel_of(connection)
    channel.ack(999)
    await until(lambda: connection.channel is not None and connection.channel is not channel)


async def test_publishes_under_way_are_told_of_the_loss(connect, line, queue):
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
async def test_a_session_that_is_over_says_so(connect, line, queue, until, operation):
    """Whoever holds it sees one kind of error, whatever it does."""
    connection = await connect(url=line.url)
    channel = channel_of(connection)
    await line.down()
    await until(lambda: connection.channel is None)
    with pytest.raises(Unavailable):
        await (await _use(channel, queue))[operation]()


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancelled_call_leaves_its_answer_to_nobody(connect, queue, fresh, turns, until):
    """The answer to it still comes; it must not be taken for the answer to the next."""
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


async def test_a_delivery_that_nobody_can_handle_takes_nothing_along(connect, queue, until):
    """It stays unsettled; those behind it are handled, on the same session."""
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
    """Without confirms, and more of it than a socket takes at once."""
    connection = await connect(confirms=False)
    channel = channel_of(connection)
    await channel.declare(queue)
    body = bytes(200_000)
    for _ in range(25):
        channel.send(body, routing_key=queue.name)
    monkeypatch.setattr(broker, "CLOSE_TIMEOUT_S", 20.0)  # a busy machine may need longer
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
