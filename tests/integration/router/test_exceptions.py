"""The exceptions queue: callers get errors, dead letters are kept, every message is settled."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import orjson
import pytest
from prometheus_client import generate_latest

from services.router.api.given_up_requests import ExceptionConsumer
from services.router.application.dead_letters import DeadLetters
from services.router.domain.dead_letters import DeadLetter, DeadLetterLimits
from services.router.domain.exceptions import EXHAUSTED, NOT_RETRIED, UNDECODABLE
from tests.conftest import PATIENCE_S
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.broker.aio_pika_channel import AioPikaChannel
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import EXCEPTIONS, Queue, replies_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply
from tidegate.kernel.store import JobStore, StoreUnavailable

pytestmark = pytest.mark.integration


class Consumer(ExceptionConsumer):
    """A consumer with the dead letters that it has kept."""

    def __init__(
        self,
        url: str,
        jobs: JobStore,
        letters: DeadLetters,
        leads: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(url, jobs, letters, leads)
        self.kept = letters

    @property
    def letters(self) -> list[DeadLetter]:
        return self.kept.all


class Gateway:
    """Publish to the exceptions queue like a worker, and read replies like a gateway."""

    def __init__(self, url: str) -> None:
        self.replies: list[Reply] = []
        self.reply_to = replies_queue(os.urandom(8).hex())
        self.connection = Connection(url, "gateway", self._setup)

    async def give_up(self, body: bytes, reply_to: str | None = "", **headers: str) -> None:
        assert self.connection.channel is not None
        to = self.reply_to.name if reply_to == "" else reply_to
        await self.connection.channel.publish(
            body, routing_key=EXCEPTIONS.name, reply_to=to, headers=headers, persistent=True, mandatory=True
        )

    async def depth(self) -> int:
        assert self.connection.channel is not None
        return await self.connection.channel.depth(EXCEPTIONS)

    async def _setup(self, channel: Channel) -> None:
        await channel.declare(EXCEPTIONS)
        await channel.declare(self.reply_to)
        await channel.consume(self.reply_to, self._on_replies, prefetch=0, no_ack=True)

    async def _on_replies(self, delivery: Delivery) -> None:
        frames = envelope.unpack(envelope.REPLIES, delivery.body)
        self.replies += [envelope.read_reply(frame) for frame in frames]


@pytest.fixture
async def gateway(rabbitmq_url) -> AsyncIterator[Gateway]:
    """A gateway, and an empty exceptions queue."""
    found = Gateway(rabbitmq_url)
    async with found.connection:
        channel = await found.connection.wait_up(PATIENCE_S)
        await channel.delete(EXCEPTIONS)
        await channel.declare(EXCEPTIONS)
        yield found


@pytest.fixture
def acked(monkeypatch) -> list[int]:
    """The settled tags: a reply arrives shortly before its message is settled."""
    found: list[int] = []
    ack = AioPikaChannel.ack

    def noted(channel: AioPikaChannel, tag: int, **how: bool) -> None:
        ack(channel, tag, **how)
        found.append(tag)

    monkeypatch.setattr(AioPikaChannel, "ack", noted)
    return found


@pytest.fixture
async def start(rabbitmq_url, jobs, tmp_path) -> AsyncIterator[Callable[..., Any]]:
    """Start a consumer; its letters are kept in one folder for the whole test."""
    async with AsyncExitStack() as stack:

        async def started(
            url: str = rabbitmq_url, keep: int = 100, keep_s: float = 3600.0, bytes: int = 2**20
        ) -> Consumer:
            blobs = Blobs(f"file://{tmp_path}/blobs")
            letters = DeadLetters(
                tmp_path / "data" / "dead-letters.jsonl",
                blobs,
                Claims(blobs, 2**20),
                DeadLetterLimits(keep, keep_s, bytes),
            )
            found = Consumer(url, jobs, letters)
            letters.start()
            found.start()
            stack.push_async_callback(letters.stop)
            stack.push_async_callback(found.stop)
            await found.connection.wait_up(PATIENCE_S)
            await found.out.wait_up(PATIENCE_S)
            return found

        yield started


def request(number: int = 1, attempt: int = 3) -> bytes:
    return envelope.request_frame(bytes([number] * 16), 1, 1, b"", [b"data"], trace=b"abc", attempt=attempt)


def packed(*frames: bytes) -> bytes:
    return envelope.pack(envelope.REQUESTS, list(frames))


@pytest.mark.parametrize(
    ("cause", "reason", "words"),
    [
        (EXHAUSTED, "model_failed", "the worker died each time"),
        (NOT_RETRIED, "model_failed", "has retry: never"),
        ("out of tea", "unavailable", "could not be handled: out of tea"),
    ],
)
async def test_the_caller_of_a_poisoned_request_gets_its_answer(
    start, gateway, until, acked, cause, reason, words
):
    consumer = await start()
    await gateway.give_up(packed(request()), cause=cause, queue="requests.v1.d")
    (reply,) = await until(lambda: gateway.replies)
    assert (reply.id, reply.status, reply.attempt) == (bytes([1] * 16), envelope.FAILED, 3)
    error = orjson.loads(reply.key)
    assert error["reason"] == reason
    assert words in error["message"]
    (letter,) = consumer.letters
    assert (letter.cause, letter.queue, letter.id, letter.attempt) == (cause, "requests.v1.d", "01" * 16, 3)
    assert (letter.size, letter.trace) == (len(request()), "abc")
    await until(lambda: len(acked) == 1)
    await consumer.stop()
    assert await gateway.depth() == 0


async def test_several_requests_in_one_envelope(start, gateway, until):
    consumer = await start()
    await gateway.give_up(packed(request(1), request(2)), cause=EXHAUSTED)
    await until(lambda: len(gateway.replies) == 2)
    assert [letter.id for letter in consumer.letters] == ["01" * 16, "02" * 16]


@pytest.mark.parametrize("body", [b"", b"garbage", packed(b"short"), envelope.pack(envelope.REPLIES, [])])
async def test_an_undecodable_message_is_kept_and_settled(start, gateway, until, acked, body):
    consumer = await start()
    await gateway.give_up(body, cause=UNDECODABLE, queue="requests.v1.d")
    await gateway.give_up(packed(request()), cause=EXHAUSTED)
    await until(lambda: gateway.replies)
    first, second = consumer.letters
    assert (first.cause, first.queue, first.size) == (UNDECODABLE, "requests.v1.d", len(body))
    assert second.cause == EXHAUSTED
    await until(lambda: len(acked) == 2)
    await consumer.stop()
    assert await gateway.depth() == 0


async def test_an_undecodable_cause_answers_no_caller(start, gateway, until):
    """A decodable envelope that a worker called undecodable: no caller gets an error."""
    consumer = await start()
    await gateway.give_up(packed(request()), cause=UNDECODABLE)
    await until(lambda: consumer.letters)
    assert consumer.letters[0].id == "01" * 16
    assert gateway.replies == []


async def test_a_message_without_a_reply_queue(start, gateway, until, acked):
    consumer = await start()
    await gateway.give_up(packed(request(1)), reply_to=None, cause=EXHAUSTED)
    await gateway.give_up(packed(request(2)), reply_to="replies.v1.gone", cause=EXHAUSTED)
    await gateway.give_up(packed(request(3)))
    await until(lambda: gateway.replies)
    assert [letter.id[:2] for letter in consumer.letters] == ["01", "02", "03"]
    assert (consumer.letters[2].cause, consumer.letters[2].queue) == ("unknown", "")
    await until(lambda: len(acked) == 3)
    await consumer.stop()
    assert await gateway.depth() == 0


async def test_letters_survive_a_restart_and_are_bounded(start, gateway, until, acked):
    consumer = await start()
    for number in range(1, 8):
        await gateway.give_up(packed(request(number)), cause=EXHAUSTED)
    await until(lambda: len(acked) == 7)
    kept = list(consumer.letters)
    await consumer.stop()
    again = await start(keep=5)
    assert again.letters == kept
    await gateway.give_up(packed(request(8)), cause=EXHAUSTED)
    await until(lambda: again.letters[-1].id == "08" * 16)
    assert again.letters[:4] == kept[-4:]
    await gateway.give_up(packed(request(9)), cause=EXHAUSTED)
    await until(lambda: again.letters[-1].id == "09" * 16)
    assert [letter.id[:2] for letter in again.letters] == ["05", "06", "07", "08", "09"]


async def test_the_router_starts_with_a_half_written_letter(start, gateway, until, acked):
    consumer = await start()
    await gateway.give_up(packed(request(1)), cause=EXHAUSTED)
    await until(lambda: acked)
    await consumer.stop()
    with consumer.kept._journal.open("ab") as journal:
        journal.write(b'{"at": 1.0, "cau')
    again = await start()
    assert [letter.id for letter in again.letters] == ["01" * 16]


async def test_messages_of_a_broker_outage_are_handled_later(start, gateway, line, until, acked):
    consumer = await start(line.url)
    await line.down()
    await until(lambda: consumer.connection.channel is None and consumer.out.channel is None)
    await gateway.give_up(packed(request()), cause=EXHAUSTED)
    await line.up()
    (reply,) = await until(lambda: gateway.replies)
    assert reply.status == envelope.FAILED
    await until(lambda: len(acked) == 1)
    await consumer.stop()
    assert await gateway.depth() == 0


def job_message(id_: bytes, rest: bytes = b"unreadable") -> bytes:
    """Return a message whose frame begins with a job's id and continues with other bytes."""
    return packed(id_ + rest)


@pytest.mark.parametrize("in_header", [True, False])
async def test_a_job_whose_message_cannot_be_read_has_failed(start, gateway, making, until, acked, in_header):
    """Its id is in the header, or at the beginning of its frame."""
    id_ = await making.accepted()
    await making.store.queued([id_])
    consumer = await start()
    headers = {"job": id_.hex()} if in_header else {}
    body = b"garbage" if in_header else job_message(id_)
    queue = f"jobs.v1.{making.deployment}.normal"
    await gateway.give_up(body, None, cause=UNDECODABLE, queue=queue, **headers)
    await until(lambda: acked)
    job = await making.store.get(id_)
    assert (job.state, job.error["reason"]) == ("failed", UNDECODABLE)
    assert consumer.letters[-1].id == id_.hex()
    counts = await making.store.counts()
    assert counts.unfinished == 0


async def test_a_job_that_runs_or_is_over_stays_unchanged(start, gateway, making, until, acked):
    running, done = await making.running(), await making.ended()
    await start()
    for id_ in (running, done, os.urandom(16)):
        await gateway.give_up(job_message(id_), None, cause=UNDECODABLE, queue="jobs.v1.d.normal")
    await until(lambda: len(acked) == 3)
    states = [(await making.store.get(id_)).state for id_ in (running, done)]
    assert states == ["running", "succeeded"]


async def test_an_unknown_job_is_kept_as_a_dead_letter(start, gateway, until, acked):
    consumer = await start()
    await gateway.give_up(b"garbage", None, cause=UNDECODABLE, queue="jobs.v1.d.normal")
    await until(lambda: acked)
    assert consumer.letters[-1].id == ""


async def test_a_job_is_failed_after_an_outage_of_the_store(
    start, gateway, making, until, acked, monkeypatch
):
    """The store fails after the router has taken the job: the message stays until the job has failed."""
    from services.router.api import given_up_requests as exceptions

    monkeypatch.setattr(exceptions, "RETRY_S", 0.05)
    finish, tries = making.store.finish, []

    async def away_twice(ends):
        tries.append(ends)
        if len(tries) < 3:
            raise StoreUnavailable("The store does not answer.")
        return await finish(ends)

    monkeypatch.setattr(making.store, "finish", away_twice)
    id_ = await making.accepted()
    consumer = await start()
    await gateway.give_up(job_message(id_), None, cause=UNDECODABLE, queue="jobs.v1.d.normal")
    await until(lambda: acked)
    job = await making.store.get(id_)
    assert (job.state, job.attempt, len(tries)) == ("failed", 1, 3)
    assert [letter.id for letter in consumer.letters] == [id_.hex()]
    await consumer.stop()
    assert await gateway.depth() == 0


async def test_only_the_leader_consumes(gateway, jobs, rabbitmq_url, tmp_path, until):
    """Two routers that both kept letters would overwrite each other's journal."""
    led = {"a": True, "b": False}

    def router(name: str) -> Consumer:
        blobs = Blobs(f"file://{tmp_path}/blobs")
        letters = DeadLetters(
            tmp_path / "letters.jsonl", blobs, Claims(blobs, 2**20), DeadLetterLimits(10, 3600.0, 2**20)
        )
        return Consumer(rabbitmq_url, jobs, letters, lambda: led[name])

    async with AsyncExitStack() as stack:
        a, b = router("a"), router("b")
        for each in (a, b):
            each.start()
            stack.push_async_callback(each.stop)
            each.kept.start()
            stack.push_async_callback(each.kept.stop)
            await each.connection.wait_up(PATIENCE_S)
        await gateway.give_up(b"1", None, cause="x", queue="requests.v1.d")
        await gateway.give_up(b"2", None, cause="x", queue="requests.v1.d")
        await until(lambda: len(a.letters) == 2)
        with pytest.raises(Unavailable, match="another router leads"):
            b.letters  # noqa: B018  it is the reading that is refused
        led |= {"a": False, "b": True}
        a.on_change()
        b.on_change()
        await until(lambda: b.kept._loaded and not a.kept._loaded)
        assert len(b.letters) == 2
        await gateway.give_up(b"3", None, cause="x", queue="requests.v1.d")
        await until(lambda: len(b.letters) == 3)
        with pytest.raises(Unavailable, match="another router leads"):
            a.letters  # noqa: B018
        assert len((tmp_path / "letters.jsonl").read_bytes().splitlines()) == 3


async def test_an_answer_goes_to_a_gateway_and_to_no_other_queue(gateway, start, until, rabbitmq_url):
    """A worker's account may not publish to `usage.v1`, and the router must not do it for a worker."""
    other = Queue(f"usage.test.{os.urandom(4).hex()}", exclusive=True)
    async with Connection(rabbitmq_url, "other", lambda channel: channel.declare(other)) as connection:
        channel = await connection.wait_up(PATIENCE_S)
        consumer = await start()
        await gateway.give_up(packed(request(1)), other.name, cause=EXHAUSTED, queue="requests.v1.d")
        await gateway.give_up(packed(request(2)), cause=EXHAUSTED, queue="requests.v1.d")
        await until(lambda: gateway.replies)
        assert len(consumer.letters) == 2
        assert await channel.depth(other) == 0


async def test_unknown_causes_are_no_metric_labels(gateway, start, until):
    consumer = await start()
    await gateway.give_up(packed(request(3)), cause='{"evil": 1}', queue="requests.v1.d")
    await until(lambda: consumer.letters)
    assert "evil" not in generate_latest().decode()
