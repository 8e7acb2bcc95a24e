"""The scheduler of requests to a language model, and its consumer's acks, without broker and engine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import pytest

from services.worker.adapters.model import Model
from services.worker.adapters.model_call import ModelAnswer
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.api.llm_requests import LlmRequestConsumer
from services.worker.application.job_scheduler import JobScheduler
from services.worker.application.llm_scheduler import CANCELLED_KEPT_S, LlmScheduler
from services.worker.domain.backlog import QueuedRequest, UnackedDelivery
from services.worker.domain.llm_bands import LlmRoom
from services.worker.domain.statistics import WorkStats
from tidegate.kernel.broker.connection import Channel, Delivery
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.protocol.llm import KV_TOKENS
from tidegate.kernel.protocol.replica_time import WASTED, Part

pytestmark = pytest.mark.unit


class Engine:
    """A model whose streams never end by themselves."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []

    async def stream(self, request: Request) -> AsyncGenerator[ModelAnswer]:
        self.begun.append(request.id)
        await asyncio.Event().wait()
        yield ModelAnswer([], {})


class Replies:
    """Keeps what is published."""

    async def reply(self, reply_to: str, frames: Sequence[Any], **_: Any) -> None:
        """Take replies."""


class Jobs:
    """Counts the job calls that may start."""

    def __init__(self) -> None:
        self.stats, self.by_id, self.open_calls = WorkStats(), dict[bytes, Any](), 0
        self.allowed: list[int] = []

    def use(self, model: Model | None) -> None:
        """Take the model."""

    def start_calls(self, free_calls: int, limit: int, free_jobs: int) -> None:
        self.allowed.append(free_calls)

    async def stop(self) -> None:
        """End nothing."""


def item(tokens: int) -> QueuedRequest:
    key = envelope.call_key((), (), {KV_TOKENS: tokens})
    deadline_ms = int((time.time() + 600) * 1e3)
    frame = envelope.request_frame(os.urandom(16), deadline_ms, 0, key, [], flags=envelope.STREAM)
    return QueuedRequest(envelope.read_request(frame), UnackedDelivery(None, 1, "", 1), time.monotonic())


def scheduler_of(settled: list[QueuedRequest], jobs: Jobs | None = None) -> LlmScheduler:
    scheduler = LlmScheduler(
        cast(ReplyPublisher, Replies()),
        settled.extend,
        LlmRoom(4, 100),
        "replica",
        on_lost=lambda _: None,
        jobs=cast(JobScheduler, jobs) if jobs else None,
    )
    scheduler.start()
    return scheduler


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_cancelled_request_that_waits_for_kv_tokens_leaves_its_place_at_once():
    settled: list[QueuedRequest] = []
    scheduler, engine = scheduler_of(settled), Engine()
    scheduler.use(cast(Model, engine))
    runs, waits = item(90), item(50)
    scheduler.add(runs)
    scheduler.add(waits)
    await turns()
    assert (engine.begun, scheduler.free) == ([runs.request.id], 0)
    scheduler.cancel([waits.request.id])
    await turns()
    assert settled == [waits]
    assert scheduler.free == 3, "the other slots are for other requests now"
    await scheduler.stop()


async def test_the_time_of_a_cancelled_stream_is_wasted():
    scheduler = scheduler_of([])
    scheduler.use(cast(Model, Engine()))
    runs = item(10)
    scheduler.add(runs)
    await turns()
    scheduler.cancel([runs.request.id])
    await turns()
    parts, open_ns = scheduler.stats.time.parts()
    assert parts[Part(WASTED, "cancelled")].requests == 1
    assert parts[Part(WASTED, "cancelled")].ns > 0
    assert open_ns == 0
    await scheduler.stop()


async def test_a_job_gets_no_slot_that_a_request_with_a_claim_will_need():
    jobs = Jobs()
    scheduler = scheduler_of([], jobs)
    scheduler.use(cast(Model, Engine()))
    await turns()
    scheduler.requests_wait = False
    scheduler.fetching = lambda: 3
    scheduler.start_jobs()
    assert jobs.allowed == [1]
    scheduler.fetching = lambda: 4
    scheduler.start_jobs()
    assert jobs.allowed == [1]
    await scheduler.stop()


async def test_cancels_are_forgotten_in_the_order_of_their_last_arrival():
    scheduler = scheduler_of([])
    now = 1000.0
    scheduler._remember_cancelled([b"a", b"b"], now)
    scheduler._remember_cancelled([b"a", b"c"], now + 1)
    assert list(scheduler._cancelled) == [b"b", b"a", b"c"]
    scheduler._remember_cancelled([b"d"], now + CANCELLED_KEPT_S)
    assert list(scheduler._cancelled) == [b"a", b"c", b"d"]
    await scheduler.stop()


class Acks:
    """A channel that knows its acks."""

    blocked = False

    def __init__(self) -> None:
        self.acked: list[int] = []

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        self.acked.append(tag)


async def test_an_ack_never_goes_to_a_later_channel():
    """On a later channel the tag is that of another request, which would be lost."""
    first, second = Acks(), Acks()

    class Publisher(Replies):
        async def publish_exception(self, body: Any, cause: str, reply_to: str | None) -> None:
            """Publish while the connection is replaced."""
            consumer._channel = cast(Channel, second)

    publisher = cast(ReplyPublisher, Publisher())
    consumer = LlmRequestConsumer("amqp://x", "d", "r", publisher, claims=cast(Any, None), fetch_bytes=1)
    consumer.deliver_to(scheduler_of([]))
    consumer._channel = cast(Channel, first)
    source = next(iter(consumer._queues))
    consumer._on_message(source, Delivery(b"garbage", 1, False, "", "", "", {}))
    await asyncio.gather(*consumer._tasks)
    assert (first.acked, second.acked) == ([], [])
    consumer._on_message(source, Delivery(b"garbage", 2, False, "", "", "", {}))
    await asyncio.gather(*consumer._tasks)
    assert second.acked == [2]


@pytest.mark.parametrize("serving", [True, False])
async def test_a_request_whose_tensors_come_after_the_model_was_lost_goes_to_another_replica(serving: bool):
    returned: list[Request] = []

    class Publisher(Replies):
        async def requeue(self, request: Request, *_: Any, **__: Any) -> None:
            returned.append(request)

    async def fetch(_: QueuedRequest) -> bool:
        return True

    publisher = cast(ReplyPublisher, Publisher())
    consumer = LlmRequestConsumer("amqp://x", "d", "r", publisher, claims=cast(Any, None), fetch_bytes=1)
    engine, scheduler = Engine(), scheduler_of([])
    consumer.deliver_to(scheduler)
    scheduler.use(cast(Model, engine) if serving else None)
    consumer._channel, consumer._renewed_at = cast(Channel, Acks()), time.monotonic()
    consumer._claim_fetcher.fetch = fetch  # type: ignore[assignment, method-assign]
    asked = item(10)
    asked.delivery.channel = consumer._channel
    await consumer._fetch(asked)
    await turns()
    assert (engine.begun, returned) == (([asked.request.id], []) if serving else ([], [asked.request]))
    assert asked.settled is not serving
    await scheduler.stop()
