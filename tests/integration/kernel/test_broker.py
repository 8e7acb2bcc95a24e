"""The link to RabbitMQ: what is declared, published and consumed, and that all of it comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from tests.conftest import PATIENCE_S
from tidegate import broker
from tidegate.broker import Delivery, Link, Session, Unroutable
from tidegate.errors import Unavailable
from tidegate.topology import EVENTS, Queue, cancels_queue, events_queue, replies_queue, requests_queue

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

    async def setup(self, session: Session) -> None:
        async def on_delivery(delivery: Delivery) -> None:
            self.got.append(delivery)
            if self._ack and not self._how.get("no_ack"):
                session.ack(delivery.tag)

        self.setups += 1
        await session.declare(self.queue)
        await session.consume(self.queue, on_delivery, **self._how)


async def nothing(_: Session) -> None:
    return


@pytest.fixture
async def connect(rabbitmq_url) -> AsyncIterator[Callable]:
    """Opens a link that is up, and stops it after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def opened(setup=nothing, url: str = rabbitmq_url, **how) -> Link:
            link = await stack.enter_async_context(Link(url, "test", setup, **how))
            await link.wait_up(20)
            return link

        yield opened


@pytest.fixture
def queue(fresh) -> Queue:
    return requests_queue(fresh("d"))


def session_of(link: Link) -> Session:
    assert link.session is not None
    return link.session


async def test_a_message_arrives_as_it_was_sent(connect, queue, until):
    inbox = Inbox(queue)
    await connect(inbox.setup)
    out = session_of(await connect())
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
    await session_of(await connect()).publish(body, routing_key=queue.name)
    await until(lambda: inbox.bodies == [body])


@pytest.mark.parametrize("left_ms", [0, -5, 0.4])
async def test_an_expiration_below_one_does_not_close_the_channel(connect, queue, left_ms):
    link = await connect()
    session = session_of(link)
    await session.declare(queue)
    await session.publish(b"late", routing_key=queue.name, expiration_ms=left_ms)
    await session.publish(b"kept", routing_key=queue.name, expiration_ms=60_000)
    assert link.session is session


async def test_an_expiration_of_years_does_not_close_the_channel(connect, queue, until):
    link = await connect()
    session = session_of(link)
    inbox = Inbox(queue)
    await connect(inbox.setup)
    await session.publish(b"some day", routing_key=queue.name, expiration_ms=10 * 366 * 86_400_000)
    await until(lambda: inbox.bodies == [b"some day"])
    assert link.session is session


async def test_an_expired_message_is_not_delivered(connect, queue, until):
    session = session_of(await connect())
    await session.declare(queue)
    await session.publish(b"late", routing_key=queue.name, expiration_ms=1)
    await until(lambda: _depth_is(session, queue, 0))
    inbox = Inbox(queue)
    await connect(inbox.setup)
    await session.publish(b"in time", routing_key=queue.name, expiration_ms=60_000)
    await until(lambda: inbox.got)
    assert inbox.bodies == [b"in time"]


async def _depth_is(session: Session, queue: Queue, expected: int) -> bool:
    return await session.depth(queue) == expected


async def test_a_mandatory_message_without_a_queue_is_returned(connect, queue):
    link = await connect()
    session = session_of(link)
    with pytest.raises(Unroutable, match="No queue for") as caught:
        await session.publish(b"x", routing_key=queue.name, mandatory=True)
    assert isinstance(caught.value, Unavailable)
    await session.publish(b"x", routing_key=queue.name)
    await session.declare(queue)
    await session.publish(b"x", routing_key=queue.name, mandatory=True)
    assert link.session is session


async def test_a_thousand_publishes_at_once(connect, queue, until):
    """All confirmed; those without a queue are returned to their own publisher and to no other."""
    inbox = Inbox(queue, no_ack=True)
    await connect(inbox.setup)
    session = session_of(await connect())

    async def publish(number: int) -> bool:
        known = number % 10 != 0
        key = queue.name if known else f"{queue.name}-nowhere"
        try:
            await session.publish(b"%d" % number, routing_key=key, mandatory=True)
        except Unroutable:
            return not known
        return known

    assert all(await asyncio.gather(*(publish(n) for n in range(1000))))
    await until(lambda: len(inbox.got) == 900)
    assert inbox.bodies == [b"%d" % n for n in range(1000) if n % 10], "in the order of publishing"


async def test_without_confirms_publishing_returns_at_once(connect, queue, until):
    inbox = Inbox(queue)
    await connect(inbox.setup)
    session = session_of(await connect(confirms=False))
    for number in range(10):
        await session.publish(b"%d" % number, routing_key=queue.name)
    await until(lambda: len(inbox.got) == 10)


async def test_many_large_messages_at_once_are_all_taken(connect, queue, until):
    """80 MiB leave in one turn of the loop: a broker that reads is waited for, and refuses none."""
    inbox = Inbox(queue)
    await connect(inbox.setup)
    session, body = session_of(await connect()), bytes(2 * 2**20)
    await asyncio.gather(*(session.publish(body, routing_key=queue.name) for _ in range(40)))
    await until(lambda: len(inbox.got) == 40)


async def test_prefetch_bounds_what_is_held(connect, queue, until):
    session = session_of(await connect())
    await session.declare(queue)
    for _ in range(5):
        await session.publish(b"x", routing_key=queue.name)
    inbox = Inbox(queue, ack=False, prefetch=2)
    consuming = session_of(await connect(inbox.setup))
    await until(lambda: _depth_is(session, queue, 3))
    assert len(inbox.got) == 2
    consuming.ack(inbox.got[1].tag, multiple=True)
    await until(lambda: len(inbox.got) == 4)


async def test_depth_is_what_waits(connect, queue):
    session = session_of(await connect())
    assert await session.depth(queue) == 0
    for _ in range(3):
        await session.publish(b"x", routing_key=queue.name)
    assert await session.depth(queue) == 3


async def test_a_cancelled_consumer_keeps_what_it_holds(connect, queue, until):
    got: list[Delivery] = []

    async def keep(delivery: Delivery) -> None:
        got.append(delivery)

    session = session_of(await connect())
    await session.declare(queue)
    consumer = await session.consume(queue, keep, prefetch=10)
    await session.publish(b"one", routing_key=queue.name)
    await until(lambda: got)
    await session.cancel(consumer)
    await session.publish(b"two", routing_key=queue.name)
    assert await session.depth(queue) == 1
    session.ack(got[0].tag)
    await session.consume(queue, keep, prefetch=10)
    await until(lambda: [d.body for d in got] == [b"one", b"two"])
    assert not got[1].redelivered


async def test_events_reach_everybody_who_listens(connect, fresh, until):
    inboxes = [Inbox(events_queue("test", fresh("i")), no_ack=True) for _ in range(2)]
    for inbox, key in zip(inboxes, ("demand.*", "registry.changed"), strict=True):

        async def setup(session: Session, inbox=inbox, key=key) -> None:
            await inbox.setup(session)
            await session.declare(EVENTS)
            await session.bind(inbox.queue, EVENTS, key)

        await connect(setup)
    session = session_of(await connect())
    await session.publish(b"a", exchange=EVENTS.name, routing_key="demand.a")
    await session.publish(b"b", exchange=EVENTS.name, routing_key="registry.changed")
    await session.publish(b"c", exchange=EVENTS.name, routing_key="demand.c")
    await until(lambda: len(inboxes[0].got) == 2 and inboxes[1].got)
    assert (inboxes[0].bodies, inboxes[1].bodies) == ([b"a", b"c"], [b"b"])
    assert inboxes[0].got[0].routing_key == "demand.a"


async def test_an_exclusive_queue_goes_with_its_connection(connect, fresh, until):
    queue = cancels_queue(fresh("r"), "i")
    inbox = Inbox(queue, no_ack=True)
    link = await connect(inbox.setup)
    session = session_of(await connect())
    await session.publish(b"x", routing_key=queue.name, mandatory=True)
    await link.stop()

    async def gone() -> bool:
        try:
            await session.publish(b"x", routing_key=queue.name, mandatory=True)
        except Unroutable:
            return True
        return False

    await until(gone)


async def test_an_exclusive_consumer_is_alone(connect, rabbitmq_url, fresh, until):
    queue = replies_queue(fresh("g"))
    first = Inbox(queue, exclusive=True)
    await connect(first.setup)
    async with Link(rabbitmq_url, "second", Inbox(queue).setup) as second:
        await until(lambda: "ACCESS_REFUSED" in (second.problem or ""))
        with pytest.raises(Unavailable, match="ACCESS_REFUSED"):
            await second.wait_up(0.01)


async def test_a_link_says_why_it_is_down(line, until):
    link = Link(line.url, "test", nothing)
    assert link.problem == "RabbitMQ is not connected yet."
    await line.down()
    async with link:
        await until(lambda: link.problem != "RabbitMQ is not connected yet.")
        assert link.session is None
        with pytest.raises(Unavailable, match="RabbitMQ"):
            await link.wait_up(0.01)
        await line.up()
        await link.wait_up(20)
        assert link.problem is None


async def test_everything_comes_back_after_a_broken_connection(connect, line, queue, until):
    inbox = Inbox(queue)
    seen: list[str] = []
    link = await connect(
        inbox.setup, line.url, on_down=lambda: seen.append("down"), on_up=lambda: seen.append("up")
    )
    out = session_of(await connect())
    before = link.session
    for round_ in range(4):
        await out.publish(b"%d" % round_, routing_key=queue.name)
        await until(lambda round_=round_: b"%d" % round_ in inbox.bodies)
        if round_ < 3:
            line.cut()
            await until(lambda round_=round_: seen == ["up", "down"] * (round_ + 1) + ["up"])
            await link.wait_up(20)
    # An ack may be lost with the line: then its message comes once more.
    assert list(dict.fromkeys(inbox.bodies)) == [b"0", b"1", b"2", b"3"]
    assert inbox.setups == 4
    assert link.session is not before
    assert link.problem is None


async def test_what_was_unsettled_is_delivered_again(connect, line, queue, until):
    inbox = Inbox(queue, ack=False)
    await connect(inbox.setup, line.url)
    await session_of(await connect()).publish(b"x", routing_key=queue.name)
    await until(lambda: len(inbox.got) == 1)
    line.cut()
    await until(lambda: len(inbox.got) == 2)
    assert [d.redelivered for d in inbox.got] == [False, True]


async def test_a_deleted_queue_comes_back_with_its_consumer(connect, queue, until):
    """The broker cancels the consumer; nobody else would ever notice."""
    inbox = Inbox(queue)
    await connect(inbox.setup)
    out = session_of(await connect())
    await out.delete(queue)
    await until(lambda: inbox.setups == 2)

    async def arrives() -> bool:
        await out.publish(b"again", routing_key=queue.name)
        return bool(inbox.got)

    await until(arrives)


async def test_a_setup_that_fails_is_tried_again(connect, rabbitmq_url, queue, until):
    attempts = 0

    async def setup(session: Session) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            # The broker closes the channel: the queue is not there.
            await session.consume(queue, lambda _: nothing(session), prefetch=1)

    async with Link(rabbitmq_url, "test", setup) as link:
        await link.wait_up(20)
    assert attempts == 3


async def test_a_channel_error_brings_a_new_session(connect, queue, fresh, until):
    link = await connect()
    session = session_of(link)
    with contextlib.suppress(Unavailable):
        await session.publish(b"x", exchange=fresh("no-such-exchange"), routing_key="")
    await until(lambda: link.session is not None and link.session is not session)
    await session_of(link).declare(queue)


async def test_an_ack_of_what_is_not_there_brings_a_new_session(connect, until):
    link = await connect()
    session = session_of(link)
    session.ack(999)
    await until(lambda: link.session is not None and link.session is not session)


async def test_publishes_under_way_are_told_of_the_loss(connect, line, queue):
    link = await connect(url=line.url)
    session = session_of(link)
    await session.declare(queue)
    tasks = [asyncio.create_task(session.publish(bytes(50_000), routing_key=queue.name)) for _ in range(50)]
    await asyncio.sleep(0)
    line.cut()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert any(isinstance(result, Unavailable) for result in results)
    assert all(result is None or isinstance(result, Unavailable) for result in results)


async def _use(session: Session, queue: Queue) -> dict[str, Callable]:
    return {
        "declare": lambda: session.declare(queue),
        "bind": lambda: session.bind(queue, EVENTS, "x"),
        "depth": lambda: session.depth(queue),
        "delete": lambda: session.delete(queue),
        "consume": lambda: session.consume(queue, lambda _: nothing(session), prefetch=1),
        "cancel": lambda: session.cancel("some-consumer"),
        "ack": lambda: session.ack(1),
        "publish": lambda: session.publish(b"x", routing_key=queue.name),
    }


@pytest.mark.parametrize(
    "operation", ["declare", "bind", "depth", "delete", "consume", "cancel", "ack", "publish"]
)
async def test_a_session_that_is_over_says_so(connect, line, queue, until, operation):
    """Whoever holds it sees one kind of error, whatever it does."""
    link = await connect(url=line.url)
    session = session_of(link)
    await line.down()
    await until(lambda: link.session is None)
    with pytest.raises(Unavailable):
        await (await _use(session, queue))[operation]()


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancelled_call_leaves_its_answer_to_nobody(connect, queue, fresh, turns, until):
    """The answer to it still comes; it must not be taken for the answer to the next."""
    link = await connect()
    session = session_of(link)
    await session.declare(queue)
    for _ in range(3):
        await session.publish(b"x", routing_key=queue.name)
    task = asyncio.create_task(session.depth(requests_queue(fresh("empty"))))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    try:
        depths = [await session.depth(queue) for _ in range(3)]
    except Unavailable:
        await until(lambda: link.session not in (None, session), "a session that cannot tell is replaced")
        depths = [await session_of(link).depth(queue)]
    assert set(depths) == {3}


async def test_a_delivery_that_nobody_can_handle_takes_nothing_along(connect, queue, until):
    """It stays unsettled; those behind it are handled, on the same session."""
    got: list[bytes] = []

    async def setup(session: Session) -> None:
        def on_delivery(delivery: Delivery) -> None:
            if delivery.body == b"poison":
                raise ValueError("not this one")
            got.append(bytes(delivery.body))
            session.ack(delivery.tag)

        await session.declare(queue)
        await session.consume(queue, on_delivery, prefetch=10)

    link = await connect(setup)
    session = link.session
    sender = session_of(await connect())
    for body in (b"poison", b"good", b"better"):
        await sender.publish(body, routing_key=queue.name)
    await until(lambda: got == [b"good", b"better"])
    assert link.session is session
    await link.stop()
    inbox = Inbox(queue)
    await connect(inbox.setup)
    await until(lambda: inbox.bodies == [b"poison"], "the broker has it still")


async def test_what_was_written_before_the_stop_arrives(connect, queue, until, monkeypatch):
    """Without confirms, and more of it than a socket takes at once."""
    link = await connect(confirms=False)
    session = session_of(link)
    await session.declare(queue)
    body = bytes(200_000)
    for _ in range(25):
        session.send(body, routing_key=queue.name)
    monkeypatch.setattr(broker, "CLOSE_TIMEOUT_S", 20.0)  # a busy machine may need longer
    await link.stop()
    inbox = Inbox(queue)
    await connect(inbox.setup)
    await until(lambda: len(inbox.got) == 25)


async def test_stopping_does_not_wait_for_a_broker_that_is_away(connect, line, until, monkeypatch):
    monkeypatch.setattr(broker, "CLOSE_TIMEOUT_S", 3600.0)
    link = await connect(url=line.url)
    await line.down()
    await until(lambda: link.session is None)
    async with asyncio.timeout(PATIENCE_S):
        await link.stop()
        await link.stop()
