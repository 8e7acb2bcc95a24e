"""A gateway process with the store of jobs, and a small worker that takes jobs from the real broker."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import orjson
import pytest
from redis import Redis

from tests.conftest import PATIENCE_S
from tests.integration.gateway.process import echo, make_table, wait_ready
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import CANCELS, cancels_queue, jobs_queue
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request, Tensor
from tidegate.kernel.protocol.jobs import LEVELS, Finish, Take
from tidegate.kernel.protocol.llm import EVENTS, META, SIGNATURE, LlmRequest
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings, unpack_strings
from tidegate.kernel.store import JobStore, StoreUnavailable
from tidegate.kernel.store.live import ROUTES
from tidegate.stack.ports import free_ports

T = TypeVar("T")


class Refused(Exception):
    """A model refuses a job, and ``reply`` says why."""

    def __init__(self, message: str, reply: bytes) -> None:
        super().__init__(message)
        self.reply = reply


@dataclass
class JobWorker:
    """Takes jobs, answers each with ``answer`` (an exception: it fails) while ``open`` is set."""

    url: str
    deployment: str
    store: JobStore
    claims: Claims
    answer: Callable[[Request], bytes] = echo
    taken: list[bytes] = field(default_factory=list)
    frames: list[Request] = field(default_factory=list)
    cancelled: list[bytes] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    busy: int = 0
    echo = staticmethod(echo)

    def __post_init__(self) -> None:
        self.open.set()
        self.connection = Connection(self.url, "job worker", self._setup, fast=True)

    async def _setup(self, channel: Channel) -> None:
        cancels = cancels_queue("w", os.urandom(4).hex())
        await channel.declare(CANCELS)
        await channel.declare(cancels)
        await channel.bind(cancels, CANCELS)

        async def on_cancels(delivery: Delivery) -> None:
            self.cancelled += map(bytes, envelope.unpack(envelope.CANCELS, delivery.body))

        async def on_job(delivery: Delivery) -> None:
            self.busy += 1
            try:
                await self._on_job(channel, delivery)
            finally:
                self.busy -= 1

        await channel.consume(cancels, on_cancels, prefetch=100, no_ack=True)
        for level in LEVELS:
            queue = jobs_queue(self.deployment, level)
            await channel.declare(queue)
            await channel.consume(queue, on_job, prefetch=200)

    async def _on_job(self, channel: Channel, delivery: Delivery) -> None:
        (frame,) = envelope.unpack(envelope.REQUESTS, delivery.body)
        request = envelope.read_request(frame)
        if request.flags & envelope.CLAIM:
            request = request._replace(data=await self.claims.redeem(request.data))
        self.frames.append(request)
        await self.open.wait()
        wish = Take(request.id, "w1", delivery.redelivered, request.attempt, os.urandom(8))
        (taken,) = await _with_patience(lambda: self.store.take([wish]))
        if taken.outcome == "run":
            self.taken.append(request.id)
            await self._finish(request, taken.attempt)
        channel.ack(delivery.tag)

    async def drained(self) -> bool:
        """Return True if no job is queued or running."""
        channel = await self.connection.wait_up(PATIENCE_S)
        waiting = [await channel.depth(jobs_queue(self.deployment, level)) for level in LEVELS]
        return not any(waiting) and not self.busy

    async def _finish(self, request: Request, attempt: int) -> None:
        try:
            end = Finish(request.id, attempt, "succeeded", self.answer(request), None, 100, 200)
        except Refused as problem:
            error = {"reason": "bad_request", "message": str(problem)}
            end = Finish(request.id, attempt, "failed", problem.reply, error)
        except ValueError as problem:
            error = {"reason": "model_failed", "message": str(problem)}
            end = Finish(request.id, attempt, "failed", b"", error)
        await _with_patience(lambda: self.store.finish([end]))


async def _with_patience(asked: Callable[[], Awaitable[T]]) -> T:
    """Call the store again while it is away, as a worker does."""
    while True:
        try:
            return await asked()
        except StoreUnavailable:
            await asyncio.sleep(0.1)


@dataclass
class Gateway:
    """A gateway process and its addresses."""

    process: subprocess.Popen[bytes]
    url: str
    deployment: str
    llm: str
    jobs: Redis
    state: Path


def with_llm(table: dict[str, Any], deployment: str) -> dict[str, Any]:
    """Return a route table with another endpoint ``chat``, a language model."""
    entry = {"format": "llm", "model": "chat", "signature": SIGNATURE.model_dump()}
    more = make_table(deployment, **entry)
    return table | {
        "endpoints": table["endpoints"] | {"chat": more["endpoints"]["digits"]},
        "deployments": table["deployments"] | more["deployments"],
    }


class Gateways:
    """Starts gateway processes that share broker and stores."""

    def __init__(self, folder: Path, amqp_url: str, redis_url: str, jobs_url: str) -> None:
        self._folder = folder
        self._env = {
            "TIDEGATE_STATE_DIR": str(folder),
            "TIDEGATE_SERVICE_TOKEN": "token",
            "TIDEGATE_AMQP_URL": amqp_url,
            "TIDEGATE_REDIS_URL": redis_url,
            "TIDEGATE_JOBS_URL": jobs_url,
            "TIDEGATE_REPORT_INTERVAL_S": "0.05",
            "TIDEGATE_CLAIM_ABOVE_BYTES": "32",
        }
        self._jobs = Redis.from_url(jobs_url)
        self.deployment = f"digits-{os.urandom(4).hex()}"
        self.llm = f"chat-{os.urandom(4).hex()}"
        redis = Redis.from_url(redis_url)
        redis.flushall()
        self._jobs.flushall()
        redis.set(ROUTES, orjson.dumps(with_llm(make_table(self.deployment), self.llm)))
        redis.close()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, **given: str) -> Gateway:
        """Start a gateway; ``given`` are settings of its own."""
        port, grpc_port = free_ports(2)
        log = self._folder / f"log-{port}"
        env = self._env | {"TIDEGATE_GATEWAY_PORT": str(port), "TIDEGATE_GATEWAY_GRPC_PORT": str(grpc_port)}
        env |= {f"TIDEGATE_{name.upper()}": value for name, value in given.items()}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "services.gateway"], env={**os.environ, **env}, stdout=out, stderr=out
            )
        self.processes.append(process)
        wait_ready(process, port, log)
        url = f"http://127.0.0.1:{port}"
        return Gateway(process, url, self.deployment, self.llm, self._jobs, self._folder)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        codes = [process.wait(PATIENCE_S) for process in self.processes]
        assert all(code in {0, -signal.SIGKILL} for code in codes), self.logs()

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("log-*")))


@pytest.fixture(scope="module")
def gateways(rabbitmq_url, valkey_url, jobs_url) -> Iterator[Gateways]:
    """Starts gateways whose only model is ``digits``."""
    with tempfile.TemporaryDirectory() as folder:
        found = Gateways(Path(folder), rabbitmq_url, valkey_url, jobs_url)
        yield found
        found.stop()


@pytest.fixture(scope="module")
def gateway(gateways) -> Gateway:
    """Yield one gateway."""
    return gateways.start()


@pytest.fixture
async def http(gateway) -> AsyncIterator[httpx.AsyncClient]:
    """Yield an HTTP client of the gateway."""
    async with httpx.AsyncClient(
        base_url=gateway.url, timeout=httpx.Timeout(PATIENCE_S, pool=None)
    ) as client:
        yield client


@pytest.fixture
async def store(jobs_url) -> AsyncIterator[JobStore]:
    """Yield the store of jobs, for reads past the gateway."""
    found = JobStore.connect(jobs_url)
    yield found
    await found.close()


@pytest.fixture
async def worker(gateway, rabbitmq_url, store, until) -> AsyncIterator[JobWorker]:
    """Yield a running worker behind the gateway. It leaves no job to the next test."""
    async with running_worker(gateway, gateway.deployment, rabbitmq_url, store, until) as found:
        yield found


@pytest.fixture
async def talker(gateway, rabbitmq_url, store, until) -> AsyncIterator[JobWorker]:
    """Yield a running worker of the language model ``chat``, which answers with its prompt."""
    async with running_worker(gateway, gateway.llm, rabbitmq_url, store, until) as found:
        found.answer = talk
        yield found


@asynccontextmanager
async def running_worker(gateway, deployment, rabbitmq_url, store, until) -> AsyncIterator[JobWorker]:
    """Run a worker. At the end it waits until no job is left."""
    blobs = Blobs(f"file://{gateway.state}/data/blobs")
    found = JobWorker(rabbitmq_url, deployment, store, Claims(blobs, 32))
    async with found.connection:
        await found.connection.wait_up(PATIENCE_S)
        yield found
        found.open.set()
        await until(found.drained)
    blobs.close()


def talk(request: Request) -> bytes:
    """Answer with the path and the prompt. A prompt ``refuse`` is refused with status 400."""
    wanted = LlmRequest.from_bytes(unpack_strings(request.data[0])[0])
    prompt = wanted.body.get("prompt", "")
    event: dict[str, Any] = {"object": wanted.path, "model": wanted.body["model"], "text": prompt}
    meta: dict[str, Any] = {"usage": [3, 5, 0]}
    if prompt == "refuse":
        event = {"error": {"message": "no such thing", "code": "no", "param": "prompt"}}
        meta = {"status": 400}
    key = envelope.result_key(tuple(Tensor(name, DATATYPES["BYTES"], (1,)) for name in (EVENTS, META)))
    data: list[Any] = [pack_strings([orjson.dumps(each)]) for each in (event, meta)]
    reply = envelope.reply_frame(request.id, request.attempt, 0, key, data)
    if prompt == "refuse":
        raise Refused("no such thing", reply)
    return reply
