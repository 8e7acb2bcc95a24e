"""Jobs without a worker are published again, expired or removed. Real store, real broker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from redis.asyncio import Redis

from services.router.application import job_sweeper as sweeper_module
from services.router.application.dead_letters import DeadLetters
from services.router.application.job_sweeper import JobSweeper
from services.router.domain.dead_letters import DeadLetterLimits
from services.router.domain.job_retention import Retention
from tests.conftest import PATIENCE_S
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import CANCELS, cancels_queue, jobs_queue
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.store.jobs import JobStore

pytestmark = pytest.mark.integration


class Worker:
    """A consumer of a Deployment's jobs and of cancels."""

    def __init__(self, url: str, deployment: str) -> None:
        self.queue = jobs_queue(deployment, "normal")
        self.got: list[Request] = []
        self.cancelled: list[bytes] = []
        self.connection = Connection(url, "worker", self._setup)
        self._cancels = cancels_queue(deployment, "x")

    async def _setup(self, channel: Channel) -> None:
        await channel.declare(self.queue)
        await channel.declare(CANCELS)
        await channel.declare(self._cancels)
        await channel.bind(self._cancels, CANCELS)
        await channel.consume(self.queue, self._on_job, prefetch=0, no_ack=True)
        await channel.consume(self._cancels, self._on_cancel, prefetch=0, no_ack=True)

    async def _on_job(self, delivery: Delivery) -> None:
        frames = envelope.unpack(envelope.REQUESTS, delivery.body)
        self.got += [envelope.read_request(frame) for frame in frames]

    async def _on_cancel(self, delivery: Delivery) -> None:
        self.cancelled += [bytes(frame) for frame in envelope.unpack(envelope.CANCELS, delivery.body)]


@pytest.fixture
async def worker(rabbitmq_url, making) -> AsyncIterator[Worker]:
    found = Worker(rabbitmq_url, making.deployment)
    async with found.connection:
        await found.connection.wait_up(PATIENCE_S)
        yield found


@pytest.fixture
async def start(rabbitmq_url, valkey_url, jobs) -> AsyncIterator[Callable[..., Any]]:
    """Start a sweeper, and stop it after the test."""
    async with AsyncExitStack() as stack:

        async def started(
            url: str = rabbitmq_url,
            keep_s: float = 3600.0,
            keep_count: int = 1000,
            keep_bytes: int = 0,
            at_least_s: float = 0.0,
            lost: Callable[[], dict[str, bool]] = dict,
            leads: Callable[[], bool] = lambda: True,
            letters: Any = None,
        ) -> JobSweeper:
            own = JobStore.connect(valkey_url)
            stack.push_async_callback(own.close)
            found = JobSweeper(
                own,
                url,
                lost,
                interval_s=0.02,
                retention=Retention(keep_s, keep_count, keep_bytes, at_least_s),
                leads=leads,
                letters=letters,
            )
            found.start()
            stack.push_async_callback(found.stop)
            return found

        yield started


@pytest.fixture
async def lapse(valkey_url) -> AsyncIterator[Callable[..., Any]]:
    """Make jobs due for the sweeper, as if their time had passed."""
    redis = Redis.from_url(valkey_url)

    async def lapsed(*ids: bytes) -> None:
        past = int(time.time() * 1e3) - 1
        for id_ in ids:
            await redis.zadd("tidegate:job:due", {id_: past})
            await redis.hset(b"tidegate:job:r:" + id_, "lease", str(past))

    yield lapsed
    await redis.aclose()


async def test_unconfirmed_jobs_are_published_again(start, making, worker, lapse, until):
    id_ = await making.accepted()
    await lapse(id_)
    await start()
    (request,) = await until(lambda: worker.got)
    assert (request.id, request.attempt, [bytes(d) for d in request.data]) == (id_, 0, [b"data"])

    async def queued() -> bool:
        job = await making.store.get(id_)
        return job.state == "queued"

    await until(queued)
    assert (await making.store.counts()).watched == 0


async def test_new_jobs_are_left_to_their_gateway(start, making, worker, lapse, until):
    sweeper = await start()
    await sweeper.out.wait_up(PATIENCE_S)
    fresh, stale = await making.accepted(), await making.accepted()
    await lapse(stale)
    await until(lambda: worker.got)
    assert [request.id for request in worker.got] == [stale]
    assert (await making.store.get(fresh)).state == "accepting"


async def test_an_expired_lease_of_a_job_that_may_not_run_twice(start, making, lapse, tmp_path, until):
    """Its worker is lost: the job has failed, and is kept as a dead letter."""
    id_ = await making.running(retry_safe=False)
    assert await making.store.lease(id_, 1, "w", int(time.time() * 1e3) + 60_000)
    asked = await making.store.request(id_)
    blobs = Blobs(f"file://{tmp_path}/blobs")
    letters = DeadLetters(
        tmp_path / "letters.jsonl", blobs, Claims(blobs, 2**20), DeadLetterLimits(10, 3600.0, 2**20)
    )
    letters.load()
    await start(letters=letters)
    await lapse(id_)
    (letter,) = await until(lambda: letters.all)
    assert (letter.kind, letter.id, letter.cause) == ("job", id_.hex(), "not_retried")
    assert await letters.payload(letter) == asked
    assert (await making.store.get(id_)).state == "failed"
    blobs.close()


async def test_an_expired_lease_is_the_next_attempt(start, making, worker, lapse, until):
    id_ = await making.running()
    assert await making.store.lease(id_, 1, "w", int(time.time() * 1e3) + 60_000)
    await start()
    await lapse(id_)
    (request,) = await until(lambda: worker.got)
    assert (request.id, request.attempt) == (id_, 1)


async def test_a_valid_lease_is_respected(start, making, worker, lapse, until):
    held, lapsed = await making.running(), await making.running()
    for id_ in (held, lapsed):
        assert await making.store.lease(id_, 1, "w", int(time.time() * 1e3) + 60_000)
    await start()
    await lapse(lapsed)
    await until(lambda: worker.got)
    assert [request.id for request in worker.got] == [lapsed]


async def test_several_sweepers_publish_once(start, making, worker, lapse, until):
    ids = [await making.accepted() for _ in range(50)]
    await lapse(*ids)
    for _ in range(3):
        await start()
    await until(lambda: len(worker.got) >= 50)

    async def settled() -> bool:
        return (await making.store.counts()).watched == 0

    await until(settled)
    assert sorted(request.id for request in worker.got) == sorted(ids)


async def test_a_deleted_queue_is_declared_again(start, making, rabbitmq_url, lapse, until):
    """The queue is declared again."""
    queue = jobs_queue(making.deployment, "normal")
    found = await start()
    first = await making.accepted()
    await lapse(first)

    async def queued(id_: bytes) -> bool:
        return (await making.store.get(id_)).state == "queued"

    await until(lambda: queued(first))
    await found.out.channel.delete(queue)
    second = await making.accepted()
    await lapse(second)

    async def again() -> bool:
        # The first try comes back unroutable and is due again in ten seconds: not for this test.
        await lapse(second)
        return await queued(second)

    await until(again)
    assert await found.out.channel.depth(queue) == 1


async def test_with_the_broker_away_it_waits(start, making, line, rabbitmq_url, lapse, until):
    found = await start(line.url)
    await found.out.wait_up(PATIENCE_S)
    await line.down()
    await until(lambda: found.out.channel is None)
    id_ = await making.accepted()
    await lapse(id_)
    await asyncio.sleep(0)
    assert (await making.store.get(id_)).state == "accepting"
    await line.up()

    async def queued() -> bool:
        await lapse(id_)
        return (await making.store.get(id_)).state == "queued"

    await until(queued)


async def test_late_jobs_expire_and_are_cancelled_at_their_worker(start, making, worker, until):
    sweeper = await start()
    await sweeper.out.wait_up(PATIENCE_S)  # a cancel is sent once, or not at all without a connection
    waiting, running, lasting = await making.accepted(), await making.running(), await making.accepted()
    await making.store._redis.zadd("tidegate:job:expiry", {waiting: 1, running: 1})

    async def expired() -> bool:
        found = await making.store.get_many([waiting, running])
        return [job.state for job in found] == ["expired", "expired"]

    await until(expired)
    await until(lambda: {waiting, running} <= set(worker.cancelled))
    assert (await making.store.get(lasting)).state == "accepting"
    counts = await making.store.counts()
    assert counts.ledger["expired"] == 2
    assert counts.unfinished == 1


async def test_old_records_are_removed(start, making, until):
    ids = [await making.ended() for _ in range(5)]
    unfinished = await making.accepted()
    await start(keep_s=0.2)

    async def gone() -> bool:
        return await making.store.get_many(ids) == [None] * 5

    await until(gone)
    assert await making.store.get(unfinished) is not None
    assert (await making.store.counts()).ledger["removed"] == 5


async def test_the_oldest_of_too_many_records_are_removed(start, making, until):
    ids = [await making.ended() for _ in range(8)]
    await start(keep_count=3)

    async def left() -> list[bytes]:
        return [id_ for id_ in ids if await making.store.get(id_) is not None]

    async def few() -> bool:
        return len(await left()) == 3

    await until(few)
    assert (await making.store.counts()).ledger["removed"] == 5


async def test_a_full_store_loses_the_oldest_results_and_none_that_is_young(start, making, until):
    old = [await making.ended() for _ in range(8)]
    used, records, over = await making.store.size()
    assert used > 0
    assert records == over == 8
    # The server alone uses more than that, so every record is one too many.
    sweeper = await start(keep_bytes=1, at_least_s=3600.0)
    seen = sweeper._rounds
    await until(lambda: sweeper._rounds >= seen + 2 * sweeper_module.MEMORY_EVERY)
    assert None not in await making.store.get_many(old)
    await sweeper.stop()
    await start(keep_bytes=1, at_least_s=0.0)

    async def gone() -> bool:
        return await making.store.get_many(old) == [None] * 8

    await until(gone)
    assert (await making.store.size())[1:] == (0, 0)


async def test_lost_messages_are_published_again_once(start, making, worker, until, monkeypatch):
    """Waiting jobs, and running jobs if no worker holds any; not leased or too young ones."""
    monkeypatch.setattr(sweeper_module, "LOST_AFTER_MS", 300)
    waiting, running, leased = await making.accepted(), await making.running(), await making.running()
    await making.store.queued([waiting])
    assert await making.store.lease(leased, 1, "w", int(time.time() * 1e3) + 60_000)
    await asyncio.sleep(0.35)
    young = await making.accepted()
    await making.store.queued([young])
    await start(lost=lambda: {making.deployment: False})
    await until(lambda: {waiting, running} <= {request.id for request in worker.got})
    await until(lambda: young in {request.id for request in worker.got})
    ids = [request.id for request in worker.got]
    assert sorted(ids) == sorted([waiting, running, young]), "each once, though it is said again and again"


async def test_running_jobs_are_not_published_while_workers_hold_messages(
    start, making, worker, until, monkeypatch
):
    monkeypatch.setattr(sweeper_module, "LOST_AFTER_MS", 0)
    waiting, running = await making.accepted(), await making.running()
    await making.store.queued([waiting])
    await start(lost=lambda: {making.deployment: True})
    await until(lambda: waiting in {request.id for request in worker.got})
    assert running not in {request.id for request in worker.got}


async def test_a_router_that_does_not_lead_does_not_sweep(start, making, worker, lapse, until):
    id_ = await making.accepted()
    await lapse(id_)
    asked: list[None] = []
    led: list[bool] = []

    def leads() -> bool:
        asked.append(None)
        return bool(led)

    sweeper = await start(leads=leads)
    await sweeper.out.wait_up(PATIENCE_S)
    rounds = len(asked)
    await until(lambda: len(asked) > rounds + 3)
    assert worker.got == []
    led.append(True)
    await until(lambda: worker.got)
