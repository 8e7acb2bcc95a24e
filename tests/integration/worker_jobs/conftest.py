"""A worker without Triton, for jobs: its real consumers, the real broker and job store, a small model."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from services.worker.adapters.model_call import ModelAnswer
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.api import jobs as consumer_module
from services.worker.api.jobs import JobConsumer
from services.worker.application.job_scheduler import JobScheduler
from services.worker.domain.concurrency import CallLimits
from services.worker.domain.split import Output
from services.worker.replica_wiring import build_job_serving, build_serving
from tests.conftest import PATIENCE_S
from tests.integration.gated_model import GatedModel
from tests.integration.serving_worker import ServingWorker
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import CANCELS, jobs_queue, requests_queue
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request, Tensor
from tidegate.kernel.protocol.jobs import LEVELS, Job, Level, NewJob, new_id
from tidegate.kernel.protocol.tensors import DATATYPES
from tidegate.kernel.store import JobStore

FP32 = DATATYPES["FP32"]
CLAIM_ABOVE = 64 * 1024


class Doubler(GatedModel):
    """A model that returns twice ``x``, and rejects negative ``x``.

    ``parameters_seen`` has the parameters of each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters_seen: list[Mapping[str, str] | None] = []
        self.parameters: dict[str, Any] = {}

    async def call(
        self, requests: list[Request], timeout_s: float, parameters: Mapping[str, str] | None = None
    ) -> ModelAnswer:
        self.parameters_seen.append(parameters)
        await self.gate(requests, timeout_s)
        x = np.frombuffer(b"".join(r.data[0] for r in requests), "<f4")
        if (x < 0).any():
            raise BadRequest("a negative number")
        rows = sum(request.rows for request in requests)
        shape = (rows, x.size // rows) if rows else (x.size,)
        return ModelAnswer([Output("y", "FP32", shape, (x * 2).astype("<f4").tobytes())], self.parameters)


def frame(id: bytes, *numbers: float, expires_ms: int, batched: bool = True, **given: Any) -> bytes:
    """Return a request frame of one row."""
    key = envelope.call_key((Tensor("x", FP32, (len(numbers),)),), (), {})
    data: list[Any] = given.pop("data", [np.array(numbers, "<f4").tobytes()])
    return envelope.request_frame(id, expires_ms, 1 if batched else 0, key, data, **given)


class JobGateway:
    """A small gateway: accepts jobs and publishes their messages."""

    def __init__(self, url: str, store: JobStore, deployment: str) -> None:
        self.store = store
        self.deployment = deployment
        self.connection = Connection(url, "shop", self._setup, fast=True)

    @property
    def channel(self) -> Channel:
        assert self.connection.channel is not None
        return self.connection.channel

    def new(self, *numbers: float, level: Level = "normal", ttl_s: float = 600.0, **given: Any) -> NewJob:
        now = int(time.time() * 1e3)
        id_, expires_ms = new_id(now, os.urandom(10)), now + int(ttl_s * 1e3)
        safe = given.pop("retry_safe", True)
        flags = given.pop("flags", 0) | (envelope.RETRY_SAFE if safe else 0)
        raw = frame(id_, *(numbers or (1.0, 2.0)), expires_ms=expires_ms, flags=flags, **given)
        return NewJob(
            id=id_,
            frame=raw,
            model="doubler",
            endpoint="doubler",
            deployment=self.deployment,
            version=1,
            principal="anonymous",
            created_ms=now,
            expires_ms=expires_ms,
            level=level,
            retry_safe=safe,
        )

    async def publish(self, new: NewJob, raw: bytes | None = None) -> None:
        body = envelope.pack(envelope.REQUESTS, [raw or new.frame])
        queue = jobs_queue(self.deployment, new.level)
        await self.channel.publish(body, routing_key=queue.name, mandatory=True, persistent=True)

    async def submit(self, *numbers: float, **given: Any) -> bytes:
        """Accept and publish a job; return its id."""
        new = self.new(*numbers, **given)
        await self.store.accept(new)
        await self.publish(new)
        await self.store.queued([new.id])
        return new.id

    async def job(self, id_: bytes) -> Job:
        found = await self.store.get(id_)
        assert found is not None
        return found

    async def is_in(self, state: str, *ids: bytes) -> bool:
        return all([(await self.job(id_)).state == state for id_ in ids])

    async def result(self, id_: bytes) -> list[float]:
        raw = await self.store.result(id_)
        assert raw is not None
        values: list[float] = np.frombuffer(envelope.read_reply(raw).data[0], "<f4").tolist()
        return values

    async def waiting(self) -> int:
        """Return how many messages wait in the queues, without those that a consumer holds."""
        return sum([await self.channel.depth(jobs_queue(self.deployment, level)) for level in LEVELS])

    async def cancel(self, id_: bytes) -> None:
        await self.channel.publish(
            envelope.pack(envelope.CANCELS, [id_]), exchange=CANCELS.name, routing_key=""
        )

    async def _setup(self, channel: Channel) -> None:
        await channel.declare(CANCELS)
        for level in LEVELS:
            await channel.declare(jobs_queue(self.deployment, level))


@dataclass
class Worker(ServingWorker):
    """A worker with jobs."""

    model: Doubler

    @property
    def jobs(self) -> JobScheduler:
        assert self.serving.jobs is not None
        return self.serving.jobs.scheduler

    @property
    def messages(self) -> JobConsumer:
        assert self.serving.jobs is not None
        assert isinstance(self.serving.jobs.messages, JobConsumer)
        return self.serving.jobs.messages

    async def die(self) -> None:
        """Die as by SIGKILL: the connections break, nothing is settled or given up."""
        self.jobs.by_id.clear()
        await self.messages.connection.stop()
        await self.stop()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs wait at a worker for long, for slow machines."""
    monkeypatch.setattr(consumer_module, "MAX_WAIT_S", 600.0)


@pytest.fixture
async def store(jobs_url) -> AsyncIterator[JobStore]:
    found = JobStore.connect(jobs_url)
    yield found
    await found.close()


@pytest.fixture
async def gateway(rabbitmq_url, store, fresh) -> AsyncIterator[JobGateway]:
    """Yield a connected gateway, for a Deployment that only this test uses."""
    found = JobGateway(rabbitmq_url, store, fresh("doubler"))
    async with found.connection:
        await found.connection.wait_up(PATIENCE_S)
        yield found


@pytest.fixture
def claims(blobs) -> Claims:
    return Claims(blobs, CLAIM_ABOVE)


@pytest.fixture
async def start(
    rabbitmq_url, jobs_url, gateway, fresh, claims
) -> AsyncIterator[Callable[..., Awaitable[Worker]]]:
    """Yield ``await start(...)``, which starts a worker; workers stop after the test."""
    async with AsyncExitStack() as stack:

        async def started(
            *,
            max_rows: int = 8,
            instances: int = 1,
            max_concurrency: int | None = None,
            url: str = rabbitmq_url,
            store_url: str = jobs_url,
            ack_timeout_s: float = 1800.0,
            serving: bool = True,
            call_ms: float | None = None,
            streams: int = 0,
            model: Any = None,
            upstream_wait_s: float = 0.0,
        ) -> Worker:
            queue, replica = requests_queue(gateway.deployment), fresh("doubler-0")
            store = JobStore.connect(store_url)
            stack.push_async_callback(store.close)
            publisher = ReplyPublisher(rabbitmq_url, queue, claims)
            limits = CallLimits(max_rows, instances, max_concurrency=max_concurrency, streams=streams)
            jobs = build_job_serving(
                url,
                gateway.deployment,
                replica,
                publisher,
                claims,
                limits,
                store,
                keep_s=60,
                ack_timeout_s=ack_timeout_s,
                upstream_wait_s=upstream_wait_s,
            )
            if call_ms is not None:
                jobs.scheduler.stats.call_ms.add(call_ms)
            parts = build_serving(
                rabbitmq_url,
                queue,
                replica,
                publisher,
                claims,
                limits,
                fetch_bytes=2**30,
                on_lost=lambda lost: parts.scheduler.use(lost),
                jobs=jobs,
            )
            worker = Worker(parts, model or Doubler())
            if serving:
                worker.scheduler.use(worker.model)  # type: ignore[arg-type]  # a model of the same shape
            publisher.connection.start()
            parts.start()
            stack.push_async_callback(worker.stop)
            for connection in (publisher.connection, worker.requests.connection, worker.messages.connection):
                await connection.wait_up(PATIENCE_S)
            await parts.open(lambda: False)
            return worker

        yield started


@pytest.fixture
def nothing_is_left(gateway, until) -> Callable[[Worker], Awaitable[None]]:
    """Return ``await nothing_is_left(worker)``: assert that it has settled all its messages at the broker."""

    async def checked(worker: Worker) -> None:
        await until(lambda: worker.messages.unsettled == 0 and not worker.jobs.by_id)
        await worker.die()
        for level in LEVELS:
            # The worker's connection is gone, so what it had not settled would be there again.
            assert await gateway.channel.depth(jobs_queue(gateway.deployment, level)) == 0

    return checked
