"""A worker without Triton: its real consumers and schedulers on the real broker, around a small model."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
import pytest

from services.worker.adapters.model import Model
from services.worker.adapters.model_call import ModelAnswer
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.domain.concurrency import CallLimits
from services.worker.domain.split import Output
from services.worker.replica_wiring import build_serving
from tests.conftest import PATIENCE_S
from tests.integration.gated_model import GatedModel
from tests.integration.serving_worker import ServingWorker
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import (
    CANCELS,
    EXCEPTIONS,
    Queue,
    replies_queue,
    requests_queue,
    suspects_queue,
)
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply, Request, Tensor
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings, unpack_strings

FP32, BYTES = DATATYPES["FP32"], DATATYPES["BYTES"]
MAX_ROWS = 8
CLAIM_ABOVE = 2 * 2**20


class Doubler(GatedModel):
    """A model that returns twice ``x``, and ``words`` backwards if there are any; it rejects negative ``x``.

    ``parameters`` are those of each of its answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, Any] = {}

    async def call(self, requests: list[Request], timeout_s: float) -> ModelAnswer:
        await self.gate(requests, timeout_s)
        x = np.frombuffer(b"".join(r.data[0] for r in requests), "<f4").reshape(-1, 2)
        if (x < 0).any():
            raise BadRequest("a negative number")
        rows = sum(request.rows for request in requests)
        shape = (rows, 2) if rows else (2,)
        outputs = [Output("y", "FP32", shape, (x * 2).astype("<f4").tobytes())]
        if len(requests[0].data) > 1:
            words = [word[::-1] for r in requests for word in unpack_strings(r.data[1])]
            outputs.append(Output("words", "BYTES", (rows,), pack_strings(words)))
        return ModelAnswer(outputs, self.parameters)


@dataclass
class Worker(ServingWorker):
    """A worker whose model doubles."""

    model: Doubler


def ask(
    *rows: Sequence[float],
    words: Sequence[str] = (),
    key: str = "x",
    timeout_s: float = 600.0,
    batched: bool = True,
    **given: Any,
) -> bytes:
    """Return a request frame for rows of two numbers.

    ``key`` is the input's name. Requests of different names do not share calls.
    """
    tensors = (Tensor(key, FP32, (2,)), *((Tensor("words", BYTES, ()),) if words else ()))
    data: list[Any] = [np.array(rows, "<f4").tobytes(), *((pack_strings(list(words)),) if words else ())]
    given.setdefault("deadline_ms", int((time.time() + timeout_s) * 1e3))
    deadline_ms = given.pop("deadline_ms")
    id_ = given.pop("id", None) or os.urandom(16)
    return envelope.request_frame(
        id_, deadline_ms, len(rows) if batched else 0, envelope.call_key(tensors, (), {}), data, **given
    )


def answer_of(reply: Reply) -> list[list[float]]:
    """Return the rows of a Doubler's answer."""
    return [list(row) for row in np.frombuffer(reply.data[0], "<f4").reshape(-1, 2).tolist()]


def failure_of(reply: Reply) -> tuple[str, str]:
    """Return reason and message of a failed reply."""
    assert reply.status == envelope.FAILED

    failure = orjson.loads(reply.key)
    return failure["reason"], failure["message"]


def brief(queue: Queue) -> Queue:
    """Return the queue, but without a consumer it lives for half a second and not for a minute."""
    return replace(queue, arguments={"x-expires": 500})


class Caller:
    """A small gateway: publishes envelopes, and keeps the replies by id, in the order of their arrival."""

    def __init__(self, url: str, queue: Queue) -> None:
        self.queue = queue
        self.replies: dict[bytes, list[Reply]] = {}
        self.reply_to = replies_queue(os.urandom(8).hex())
        self.connection = Connection(url, "caller", self._setup, fast=True)

    @property
    def channel(self) -> Channel:
        assert self.connection.channel is not None
        return self.connection.channel

    async def send(self, *frames: bytes, body: bytes | None = None) -> list[bytes]:
        """Publish one envelope with these frames; return their ids."""
        packed = envelope.pack(envelope.REQUESTS, list(frames)) if body is None else body
        await self.channel.publish(packed, routing_key=self.queue.name, reply_to=self.reply_to.name)
        return [frame[:16] for frame in frames]

    async def cancel(self, *ids: bytes) -> None:
        await self.channel.publish(
            envelope.pack(envelope.CANCELS, list(ids)), exchange=CANCELS.name, routing_key=""
        )

    def reply(self, id_: bytes) -> Reply | None:
        """Return the one reply to a request; None if there is none yet."""
        found = self.replies.get(id_, [])
        assert len(found) <= 1, "answered twice"
        return found[0] if found else None

    async def _setup(self, channel: Channel) -> None:
        await channel.declare(self.queue)
        await channel.declare(suspects_queue(self.queue))
        await channel.declare(CANCELS)
        await channel.declare(self.reply_to)
        await channel.consume(self.reply_to, self._on_replies, prefetch=0, no_ack=True)

    async def _on_replies(self, delivery: Delivery) -> None:
        for frame in envelope.unpack(envelope.REPLIES, delivery.body):
            reply = envelope.read_reply(frame)
            self.replies.setdefault(reply.id, []).append(reply)


@dataclass
class ExceptionQueue:
    """Consumes the exceptions queue instead of the router; keeps the messages of the test's own queue."""

    queue: Queue
    got: list[Delivery] = field(default_factory=list)

    async def setup(self, channel: Channel) -> None:
        async def on_delivery(delivery: Delivery) -> None:
            if delivery.headers.get("queue") == self.queue.name:
                self.got.append(delivery)
            channel.ack(delivery.tag)

        await channel.declare(EXCEPTIONS)
        await channel.consume(EXCEPTIONS, on_delivery, prefetch=100)


@pytest.fixture
def queue(fresh) -> Queue:
    """Return the requests queue of a Deployment that only this test uses."""
    return requests_queue(fresh("doubler"))


@pytest.fixture
async def caller(rabbitmq_url, queue) -> AsyncIterator[Caller]:
    """Yield a connected gateway."""
    found = Caller(rabbitmq_url, queue)
    async with found.connection:
        await found.connection.wait_up(PATIENCE_S)
        yield found


@pytest.fixture
async def exceptions(rabbitmq_url, queue) -> AsyncIterator[ExceptionQueue]:
    """Yield the exceptions of this test's queue."""
    found = ExceptionQueue(queue)
    async with Connection(rabbitmq_url, "letters", found.setup) as connection:
        await connection.wait_up(PATIENCE_S)
        yield found


@pytest.fixture
def claims(blobs) -> Claims:
    """Return claims for tensors of more than ``CLAIM_ABOVE`` bytes."""
    return Claims(blobs, CLAIM_ABOVE)


@pytest.fixture
async def start(rabbitmq_url, queue, fresh, claims) -> AsyncIterator[Callable[..., Any]]:
    """Yield ``await start(max_rows=..., in_url=..., out_url=...)``; workers stop after the test."""
    async with AsyncExitStack() as stack:

        async def started(
            *,
            max_rows: int = MAX_ROWS,
            window_s: float = 0.0,
            instances: int = 1,
            max_concurrency: int | None = None,
            in_url: str = rabbitmq_url,
            out_url: str = rabbitmq_url,
            serving: bool = True,
            fetch_bytes: int = 2**30,
            streams: int = 0,
            model: Any = None,
            again: bool = True,
        ) -> Worker:
            """Start a worker. ``again``: a model server that was lost is back at once."""
            publisher = ReplyPublisher(out_url, queue, claims)
            limits = CallLimits(max_rows, instances, window_s, max_concurrency, streams)

            def on_lost(lost: Model) -> None:
                if again:
                    worker.scheduler.use(lost)

            parts = build_serving(
                in_url,
                queue,
                fresh("doubler-0"),
                publisher,
                claims,
                limits,
                fetch_bytes=fetch_bytes,
                on_lost=on_lost,
            )
            worker = Worker(parts, model or Doubler())
            if serving:
                worker.scheduler.use(worker.model)  # type: ignore[arg-type]  # a model of the same shape
            publisher.connection.start()
            parts.start()
            stack.push_async_callback(worker.stop)
            await parts.wait_up(PATIENCE_S)
            await worker.requests.open()
            return worker

        yield started


@pytest.fixture
def left(caller, queue) -> Callable[[], Any]:
    """Return ``await left()``: the messages that wait in the queue, without those that a consumer holds."""
    return lambda: caller.channel.depth(queue)


@pytest.fixture
def suspects(caller, queue) -> Callable[[], Any]:
    """Return ``await suspects()``: the requests that wait to run alone."""
    return lambda: caller.channel.depth(suspects_queue(queue))


@pytest.fixture
def nothing_is_left(rabbitmq_url, caller, queue, until) -> Callable[[Worker], Any]:
    """Return ``await nothing_is_left(worker)``: assert that it has settled all its deliveries at the broker.

    The worker dies. The broker admits an exclusive consumer once it has dropped the worker's consumer and
    requeued what was unsettled. So all that comes before the mark was not settled.
    """

    async def checked(worker: Worker) -> None:
        await until(lambda: worker.requests.unsettled == 0 and worker.scheduler.in_hand == 0)
        await worker.die()
        found: list[bytes] = []

        async def setup(channel: Channel) -> None:
            async def on_delivery(delivery: Delivery) -> None:
                found.append(bytes(delivery.body))
                channel.ack(delivery.tag)

            await channel.consume(queue, on_delivery, prefetch=100, exclusive=True)

        async with Connection(rabbitmq_url, "auditor", setup) as connection:
            await connection.wait_up(PATIENCE_S)
            await caller.send(body=b"mark")
            await until(lambda: b"mark" in found)
            assert await caller.channel.depth(suspects_queue(queue)) == 0, "a suspect was not settled"
        assert found == [b"mark"], "a delivery was taken for settled and was not"

    return checked


@pytest.fixture(scope="session")
def make() -> Callable[..., bytes]:
    """Return ``make([1, 2], [3, 4], ...)``, which returns a request frame."""
    return ask


@pytest.fixture(scope="session")
def shown() -> Callable[[Reply], list[list[float]]]:
    """Return a function that returns the rows of an answer."""
    return answer_of


@pytest.fixture(scope="session")
def failure() -> Callable[[Reply], tuple[str, str]]:
    """Return a function that returns reason and message of a failure."""
    return failure_of
