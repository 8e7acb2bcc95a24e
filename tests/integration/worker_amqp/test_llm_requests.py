"""Requests to a language model at the worker: slots, bands, the KV budget, and requests that were lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from services.worker.adapters.model_call import ModelAnswer
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.api.llm_requests import LlmRequestConsumer
from services.worker.application.llm_scheduler import LlmScheduler
from services.worker.application.serving import ReplicaServing
from services.worker.domain.llm_bands import LlmRoom
from services.worker.domain.split import Output
from services.worker.replica_wiring import build_llm_serving
from tests.conftest import PATIENCE_S
from tests.integration.worker_amqp.conftest import Caller, brief, failure_of
from tidegate.kernel.broker.topology import replica_queue, requests_queue
from tidegate.kernel.errors import ModelFailed, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import CHUNK, END, FAILED, RETRY_SAFE, STREAM, Request
from tidegate.kernel.protocol.llm import BAND_PRIORITY, KV_TOKENS, REPLICA, Band
from tidegate.kernel.protocol.tensors import pack_strings

pytestmark = pytest.mark.integration


class Engine:
    """A model that answers a request with two events, the second one after a permit."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.running = self.most = self.cancelled = 0
        self.go = asyncio.Semaphore(0)
        self.fail: Exception | None = None

    async def stream(self, request: Request) -> AsyncGenerator[ModelAnswer]:
        self.begun.append(request.id)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield ModelAnswer([Output("events", "BYTES", (1,), pack_strings(["a"]))], {})
            await self.go.acquire()
            if self.fail is not None:
                raise self.fail
            yield ModelAnswer([Output("events", "BYTES", (1,), pack_strings(["b"]))], {})
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def stream_forever(self, request: Request) -> AsyncGenerator[ModelAnswer]:
        """Answer as a long text does, until the call is cancelled."""
        self.begun.append(request.id)
        try:
            while True:
                yield ModelAnswer([Output("events", "BYTES", (1,), pack_strings(["a"]))], {})
                await asyncio.sleep(0.02)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    def finish(self, count: int) -> None:
        for _ in range(count):
            self.go.release()


@dataclass
class LlmWorker:
    """A language model's replica without Triton."""

    name: str
    engine: Engine
    serving: ReplicaServing
    publisher: ReplyPublisher

    @property
    def requests(self) -> LlmRequestConsumer:
        assert isinstance(self.serving.requests, LlmRequestConsumer)
        return self.serving.requests

    @property
    def scheduler(self) -> LlmScheduler:
        assert isinstance(self.serving.scheduler, LlmScheduler)
        return self.serving.scheduler

    async def die(self) -> None:
        """Die as by SIGKILL: the connections break, nothing is settled."""
        await self.requests.connection.stop()
        await self.stop()

    async def stop(self) -> None:
        await self.serving.stop()
        await self.publisher.connection.stop()


class LlmCaller:
    """Publishes requests to the queues of bands, and knows the replies."""

    def __init__(self, caller: Caller, deployment: str) -> None:
        self.caller = caller
        self.deployment = deployment

    async def ask(
        self, make: Callable[..., bytes], band: Band = "normal", *, tokens: int = 0, **given: Any
    ) -> bytes:
        """Publish a request, and return its id."""
        flags = RETRY_SAFE | STREAM | BAND_PRIORITY[band] << envelope.PRIORITY_SHIFT
        frame = make([1, 2], flags=flags, **given)
        if tokens:
            request = envelope.read_request(frame)
            key = envelope.call_key((), (), {KV_TOKENS: tokens})
            frame = envelope.request_frame(
                request.id, request.deadline_ms, 0, key, [bytes(part) for part in request.data], flags=flags
            )
        await self.put(frame, requests_queue(self.deployment, band).name)
        return frame[:16]

    async def put(self, frame: bytes, queue: str, expiration_ms: float | None = None) -> None:
        await self.caller.channel.publish(
            envelope.pack(envelope.REQUESTS, [frame]),
            routing_key=queue,
            reply_to=self.caller.reply_to.name,
            expiration_ms=expiration_ms,
            mandatory=True,
        )

    def last(self, id_: bytes) -> int | None:
        """Return the status of the last reply to a request."""
        found = self.caller.replies.get(id_)
        return found[-1].status if found else None

    async def depths(self) -> dict[str, int]:
        return {
            band: await self.caller.channel.depth(requests_queue(self.deployment, band))
            for band in BAND_PRIORITY
        }


@pytest.fixture
def deployment(fresh) -> str:
    return fresh("doubler")


@pytest.fixture
def queue(deployment):
    return requests_queue(deployment)


@pytest.fixture
async def llm(caller, deployment) -> LlmCaller:
    for band in BAND_PRIORITY:
        await caller.channel.declare(requests_queue(deployment, band))
    return LlmCaller(caller, deployment)


@pytest.fixture
async def start(rabbitmq_url, deployment, claims, llm) -> AsyncIterator[Callable[..., Any]]:
    """Yield ``await start(slots=..., kv_tokens=...)``; workers stop after the test."""
    async with AsyncExitStack() as stack:
        number = 0

        async def started(*, slots: int = 2, kv_tokens: int | None = None) -> LlmWorker:
            nonlocal number
            number += 1
            name = f"{deployment}-0-{number}"
            publisher = ReplyPublisher(rabbitmq_url, requests_queue(deployment), claims)
            lost: list[Any] = []
            serving = build_llm_serving(
                rabbitmq_url,
                deployment,
                name,
                publisher,
                claims,
                LlmRoom(slots, kv_tokens),
                fetch_bytes=2**30,
                on_lost=lost.append,
            )
            worker = LlmWorker(name, Engine(), serving, publisher)
            worker.scheduler.use(worker.engine)  # type: ignore[arg-type]  # a model of the same shape
            publisher.connection.start()
            serving.start()
            stack.push_async_callback(worker.stop)
            await serving.wait_up(PATIENCE_S)
            await serving.open(lambda: False)
            return worker

        yield started


async def test_the_worker_never_holds_more_than_its_slots(start, llm, make, until):
    worker = await start(slots=2)
    ids = [await llm.ask(make) for _ in range(6)]
    await until(lambda: len(worker.engine.begun) == 2)

    async def four_wait() -> bool:
        return await llm.depths() == {"high": 0, "normal": 4, "low": 0}

    await until(four_wait)
    assert worker.requests.unsettled == 2
    for finished in range(1, 7):
        worker.engine.finish(1)
        await until(lambda n=finished: sum(llm.last(id_) == END for id_ in ids) == n)
    assert (worker.engine.most, len(worker.engine.begun)) == (2, 6)
    assert worker.engine.begun == ids, "first come, first served"
    await until(lambda: worker.requests.unsettled == 0)


async def test_the_first_event_names_the_replica(start, llm, make, until):
    worker = await start()
    worker.engine.finish(1)
    id_ = await llm.ask(make)
    await until(lambda: llm.last(id_) == END)
    first, second, _ = llm.caller.replies[id_]
    assert envelope.read_result_key(first.key)[1] == {REPLICA: worker.name}
    assert envelope.read_result_key(second.key)[1] == {}


async def test_bands_share_the_slots_by_weight(start, llm, make, until):
    worker = await start(slots=1)
    first = await llm.ask(make)
    await until(lambda: worker.engine.begun == [first])
    bands: dict[bytes, Band] = {}
    for band in BAND_PRIORITY:
        for _ in range(22):
            bands[await llm.ask(make, band)] = band
    worker.engine.finish(22)
    await until(lambda: len(worker.engine.begun) == 23)
    assert Counter(bands[id_] for id_ in worker.engine.begun[1:22]) == {"high": 16, "normal": 4, "low": 1}
    worker.engine.finish(100)
    await until(lambda: len(worker.engine.begun) == 67)
    await until(lambda: worker.requests.unsettled == 0)


async def test_a_free_slot_serves_every_band_at_once(start, llm, make, until):
    worker = await start(slots=3)
    ids = [await llm.ask(make, band) for band in BAND_PRIORITY]
    await until(lambda: set(worker.engine.begun) == set(ids))


async def test_two_workers_share_a_burst_without_loss(start, llm, make, until):
    workers = [await start(slots=3), await start(slots=3)]
    ids = await asyncio.gather(*(llm.ask(make, band) for band in BAND_PRIORITY for _ in range(20)))
    for worker in workers:
        worker.engine.finish(100)
    await until(lambda: all(llm.last(id_) == END for id_ in ids))
    begun = Counter(id_ for worker in workers for id_ in worker.engine.begun)
    assert begun == dict.fromkeys(ids, 1), "each request runs once"
    assert all(worker.engine.most <= 3 for worker in workers)
    assert all(len(llm.caller.replies[id_]) == 3 for id_ in ids)


async def test_the_tokens_in_the_cache_are_limited(start, llm, make, until):
    worker = await start(slots=4, kv_tokens=1000)
    ids = [await llm.ask(make, tokens=600), await llm.ask(make, tokens=600), await llm.ask(make, tokens=10)]
    await until(lambda: worker.engine.begun == ids[:1] and worker.scheduler.in_hand == 2)

    async def one_waits() -> bool:
        return (await llm.depths())["normal"] == 1

    await until(one_waits)  # behind the one that needs room
    worker.engine.finish(1)
    await until(lambda: worker.engine.begun == ids)
    worker.engine.finish(2)
    await until(lambda: all(llm.last(id_) == END for id_ in ids))


async def test_a_request_larger_than_the_cache_runs_alone(start, llm, make, until):
    worker = await start(slots=4, kv_tokens=100)
    id_ = await llm.ask(make, tokens=5000)
    worker.engine.finish(1)
    await until(lambda: llm.last(id_) == END)


async def test_a_cancel_frees_the_slot_for_the_next(start, llm, make, until):
    worker = await start(slots=1)
    first, second = await llm.ask(make), await llm.ask(make)
    await until(lambda: worker.engine.begun == [first])
    await llm.caller.cancel(first)
    await until(lambda: worker.engine.begun == [first, second])
    assert worker.engine.cancelled == 1
    await until(lambda: llm.last(first) == CHUNK)  # the gateway has told its caller


async def test_a_request_that_was_cancelled_in_its_queue_never_starts(start, llm, make, until):
    worker = await start(slots=1)
    first, second, third = [await llm.ask(make) for _ in range(3)]
    await until(lambda: worker.engine.begun == [first])
    await llm.caller.cancel(second)
    await until(lambda: second in worker.scheduler._cancelled)
    worker.engine.finish(2)
    await until(lambda: llm.last(third) == END)
    assert worker.engine.begun == [first, third]


async def test_requests_of_a_dead_worker_are_answered_as_lost(start, llm, make, until):
    worker = await start(slots=2)
    ids = [await llm.ask(make), await llm.ask(make)]
    waiting = await llm.ask(make)
    await until(lambda: all(llm.last(id_) == CHUNK for id_ in ids))
    await worker.die()
    other = await start(slots=2)
    await until(lambda: all(llm.last(id_) == FAILED for id_ in ids))
    assert {failure_of(llm.caller.replies[id_][-1])[0] for id_ in ids} == {"worker_lost"}
    other.engine.finish(1)
    await until(lambda: llm.last(waiting) == END)
    assert other.engine.begun == [waiting], "a lost request does not run here"
    await until(lambda: other.requests.unsettled == 0)


async def test_a_stream_longer_than_its_deadline_is_lost_too(start, llm, make, until):
    worker = await start()
    id_ = await llm.ask(make, timeout_s=5.0)
    await until(lambda: llm.last(id_) == CHUNK)
    await asyncio.sleep(5.1)
    await worker.die()
    await start()
    await until(lambda: llm.last(id_) == FAILED)
    assert failure_of(llm.caller.replies[id_][-1])[0] == "worker_lost"


async def test_a_request_whose_engine_died_is_lost(start, llm, make, until):
    worker = await start()
    id_ = await llm.ask(make)
    await until(lambda: llm.last(id_) == CHUNK)
    worker.engine.fail = Unavailable("gone")
    worker.engine.finish(1)
    await until(lambda: llm.last(id_) == FAILED)
    assert failure_of(llm.caller.replies[id_][-1])[0] == "worker_lost"
    assert not worker.scheduler.serving, "no request starts until the model is back"
    later = await llm.ask(make)
    worker.engine.fail = None
    worker.engine.finish(1)
    worker.scheduler.use(worker.engine)
    await until(lambda: llm.last(later) == END)


async def test_a_failure_of_the_model_reaches_the_caller(start, llm, make, until):
    worker = await start()
    worker.engine.fail = ModelFailed("out of tea")
    worker.engine.finish(1)
    id_ = await llm.ask(make)
    await until(lambda: llm.last(id_) == FAILED)
    assert failure_of(llm.caller.replies[id_][-1]) == ("model_failed", "out of tea")


async def test_a_worker_that_keeps_running_keeps_its_streams(start, llm, make, until):
    """Only the connection was lost. The worker gets its request again, and the stream goes on."""
    worker = await start()
    id_ = await llm.ask(make)
    await until(lambda: llm.last(id_) == CHUNK)
    channel = worker.requests.connection.channel
    channel.abort("test")
    await until(lambda: worker.requests.unsettled == 1 and worker.requests._channel not in (None, channel))
    worker.engine.finish(1)
    await until(lambda: llm.last(id_) == END)
    assert [reply.status for reply in llm.caller.replies[id_]] == [CHUNK, CHUNK, END]
    await until(lambda: worker.requests.unsettled == 0)


async def test_a_closed_worker_leaves_the_queue_to_others(start, llm, make, until):
    worker = await start(slots=1)
    running, waiting = await llm.ask(make), await llm.ask(make)
    await until(lambda: worker.engine.begun == [running])
    await worker.serving.close()
    worker.engine.finish(1)
    await until(lambda: llm.last(running) == END and worker.requests.unsettled == 0)
    assert worker.engine.begun == [running]
    other = await start(slots=1)
    other.engine.finish(1)
    await until(lambda: llm.last(waiting) == END)


async def test_a_request_prefers_its_replica_and_is_stolen_when_that_is_busy(
    start, llm, make, until, deployment
):
    busy, free = await start(slots=1), await start(slots=1)
    own = replica_queue(deployment, busy.name, "normal").name

    async def ask_own() -> bytes:
        frame = make([1, 2], flags=RETRY_SAFE | STREAM)
        await llm.put(frame, own, expiration_ms=100)
        return frame[:16]

    first = await ask_own()
    await until(lambda: busy.engine.begun == [first])
    stolen = await ask_own()
    await until(lambda: free.engine.begun == [stolen])
    free.engine.finish(1)
    await until(lambda: llm.last(stolen) == END)
    assert {reply.attempt for reply in llm.caller.replies[stolen]} == {1}


async def test_a_plain_request_is_refused(start, llm, make, until):
    await start()
    frame = make([1, 2])
    await llm.put(frame, requests_queue(llm.deployment).name)
    await until(lambda: llm.last(frame[:16]) == FAILED)
    assert failure_of(llm.caller.replies[frame[:16]][-1])[0] == "bad_request"


async def test_an_expired_request_never_starts(start, llm, make, until):
    id_ = await llm.ask(make, deadline_ms=int(time.time() * 1e3) - 1)
    worker = await start()
    later = await llm.ask(make)
    worker.engine.finish(1)
    await until(lambda: llm.last(later) == END)
    assert worker.engine.begun == [later]
    assert id_ not in llm.caller.replies


@pytest.fixture
async def endless(start) -> LlmWorker:
    """Return a worker with one slot whose engine writes until it is cancelled."""
    worker = await start(slots=1)
    worker.engine.stream = worker.engine.stream_forever
    return worker


async def test_the_slot_of_a_gateway_that_was_killed_becomes_free(
    endless, llm, rabbitmq_url, queue, make, until
):
    endless.publisher.gone_s = 0.5
    killed = Caller(rabbitmq_url, queue)
    killed.reply_to = brief(killed.reply_to)
    async with killed.connection:
        await killed.connection.wait_up(PATIENCE_S)
        lost = await LlmCaller(killed, llm.deployment).ask(make)
        await until(lambda: killed.replies.get(lost))
    waits = await llm.ask(make, timeout_s=PATIENCE_S)
    await until(lambda: llm.last(waits) == CHUNK)
    assert endless.engine.begun == [lost, waits]
    assert endless.engine.cancelled == 1, "the engine wrote no further for the gateway that has ended"
    assert endless.requests.unsettled == 1
    assert endless.scheduler.stats.completed == 0
