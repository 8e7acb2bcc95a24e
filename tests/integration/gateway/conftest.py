"""A small worker that uses the real protocol over the real broker, and a dispatcher in front of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import orjson
import pytest
from redis import Redis
from tritonclient.grpc import service_pb2_grpc as stubs

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.domain.memory_budget import MemoryBudget
from services.gateway.domain.replica_fleet import UNKNOWN_FLEET, ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute, parse_table
from tests.conftest import PATIENCE_S
from tests.integration.gateway.process import echo, make_table, wait_ready
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import (
    CANCELS,
    EVENTS,
    Queue,
    cancels_queue,
    events_queue,
    requests_queue,
)
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply, Request
from tidegate.kernel.protocol.llm import BAND_WEIGHTS
from tidegate.kernel.store.live import GATEWAY, ROUTES, ROUTES_CHANGED
from tidegate.stack.ports import free_ports

CLAIM_ABOVE = 2 * 2**20


def silent(_: Request) -> None:
    """Never answer."""


def submit(
    dispatcher: Dispatcher,
    route: DeploymentRoute,
    rows: int,
    key: bytes,
    data: bytes,
    timeout_s: float,
    trace: bytes,
) -> tuple[bytes, asyncio.Future[Reply]]:
    """Queue a request; return its id and the future of its reply or error."""
    future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def done(outcome: Reply | TidegateError) -> None:
        if future.done():
            return
        if isinstance(outcome, TidegateError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    return dispatcher.send(route, rows, key, [data], timeout_s, trace, done), future


class Peer:
    """A worker that answers each request with ``answer`` and keeps everything that it received."""

    def __init__(self, url: str, deployment: str) -> None:
        self._deployment = deployment
        self.queue: Queue = requests_queue(deployment)
        self.answer: Callable[[Request], bytes | None] = echo
        self.envelopes: list[list[Request]] = []
        self.deliveries: list[Delivery] = []
        self.cancelled: list[bytes] = []
        self.demanded: list[str] = []
        self._cancels = cancels_queue(deployment, os.urandom(4).hex())
        self._events = events_queue("test", os.urandom(4).hex())
        self.connection = Connection(url, "peer", self._setup, fast=True)

    @property
    def requests(self) -> list[Request]:
        return [request for found in self.envelopes for request in found]

    async def _setup(self, channel: Channel) -> None:
        async def on_requests(delivery: Delivery) -> None:
            await self._on_requests(channel, delivery)

        bands = [requests_queue(self._deployment, band) for band in BAND_WEIGHTS]  # normal: self.queue
        for queue in (*bands, self._cancels, self._events):
            await channel.declare(queue)
        for exchange in (CANCELS, EVENTS):
            await channel.declare(exchange)
        await channel.bind(self._cancels, CANCELS)
        await channel.bind(self._events, EVENTS, "demand.#")
        await channel.consume(self._cancels, self._on_cancels, prefetch=100, no_ack=True)
        await channel.consume(self._events, self._on_demand, prefetch=100, no_ack=True)
        for queue in bands:
            await channel.consume(queue, on_requests, prefetch=1000)

    async def _on_requests(self, channel: Channel, delivery: Delivery) -> None:
        found = [envelope.read_request(f) for f in envelope.unpack(envelope.REQUESTS, delivery.body)]
        self.envelopes.append(found)
        self.deliveries.append(delivery)
        channel.ack(delivery.tag)
        replies = [frame for request in found if (frame := self.answer(request)) is not None]
        if replies:
            assert delivery.reply_to is not None
            await channel.publish(
                envelope.pack(envelope.REPLIES, list(replies)), routing_key=delivery.reply_to
            )

    async def _on_cancels(self, delivery: Delivery) -> None:
        self.cancelled += map(bytes, envelope.unpack(envelope.CANCELS, delivery.body))

    async def _on_demand(self, delivery: Delivery) -> None:
        self.demanded.append(delivery.routing_key.removeprefix("demand."))


class Fleets(dict[str, ReplicaFleet]):
    """The fleets that the dispatcher sees."""

    def __call__(self, name: str) -> ReplicaFleet:
        return self.get(name, UNKNOWN_FLEET)


@pytest.fixture
def deployment(fresh) -> str:
    """Return the name of a Deployment for this test only."""
    found: str = fresh("digits")
    return found


@pytest.fixture(scope="session")
def table() -> Callable[..., dict[str, Any]]:
    """``table(deployment, **fields)`` returns a route table as the router publishes it."""
    return make_table


@pytest.fixture
def route(deployment) -> Callable[..., DeploymentRoute]:
    """``route(**fields)`` returns the test's Deployment as the gateway knows it."""
    return lambda **given: parse_table(make_table(deployment, **given)).find("digits", "")[1]


@pytest.fixture
async def peer(rabbitmq_url, deployment) -> AsyncIterator[Peer]:
    """Start the test's worker."""
    found = Peer(rabbitmq_url, deployment)
    async with found.connection:
        await found.connection.wait_up(PATIENCE_S)
        yield found


@pytest.fixture
def make_peer(rabbitmq_url) -> Callable[[str], Any]:
    """``async with make_peer(deployment) as peer`` starts a worker."""

    @asynccontextmanager
    async def opened(deployment: str) -> AsyncIterator[Peer]:
        found = Peer(rabbitmq_url, deployment)
        async with found.connection:
            yield found

    return opened


@pytest.fixture
def fleets() -> Fleets:
    """Return empty fleets: no worker is known."""
    return Fleets()


@pytest.fixture
def claims(tmp_path) -> Iterator[Claims]:
    """Return claims on a blob store for this test only."""
    blobs = Blobs(f"file://{tmp_path / 'blobs'}")
    yield Claims(blobs, CLAIM_ABOVE)
    blobs.close()


@pytest.fixture
async def dispatch(rabbitmq_url, fleets, claims) -> AsyncIterator[Callable[..., Any]]:
    """Start a dispatcher that is connected, and stop it after the test."""
    async with AsyncExitStack() as stack:

        async def opened(
            url: str = rabbitmq_url, answers: MemoryBudget | None = None, **given: Any
        ) -> Dispatcher:
            answers = answers or MemoryBudget(2**30)
            found = Dispatcher(url, os.urandom(8), fleets, claims=claims, answers=answers, **given)
            found.start()
            stack.push_async_callback(found.stop)
            await found.out.wait_up(PATIENCE_S)
            await found.back.wait_up(PATIENCE_S)
            return found

        yield opened


@dataclass
class Gateway:
    """A gateway process and its addresses."""

    process: subprocess.Popen[bytes]
    port: int
    grpc_port: int
    deployment: str
    redis: Redis
    state: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"


@pytest.fixture(scope="module")
def gateway_env() -> dict[str, str]:
    """Return further settings of the gateway; a module may override them."""
    return {"TIDEGATE_MAX_BODY_BYTES": "100000"}


@pytest.fixture(scope="module")
def gateway_route() -> dict[str, Any]:
    """Return further fields of the Deployment; a module may override them."""
    return {}


@pytest.fixture(scope="module")
def gateway(rabbitmq_url, valkey_url, table, gateway_env, gateway_route) -> Iterator[Gateway]:
    """Start a gateway process whose only model is ``digits``."""
    deployment = f"digits-{os.urandom(4).hex()}"
    port, grpc_port = free_ports(2)
    redis = Redis.from_url(valkey_url)
    redis.flushall()
    redis.set(ROUTES, orjson.dumps(table(deployment, **gateway_route)))
    with tempfile.TemporaryDirectory() as state, (Path(state) / "log").open("wb") as log:
        environment = {
            "TIDEGATE_STATE_DIR": state,
            "TIDEGATE_SERVICE_TOKEN": "token",
            "TIDEGATE_GATEWAY_PORT": str(port),
            "TIDEGATE_GATEWAY_GRPC_PORT": str(grpc_port),
            "TIDEGATE_AMQP_URL": rabbitmq_url,
            "TIDEGATE_REDIS_URL": valkey_url,
            "TIDEGATE_REPORT_INTERVAL_S": "0.05",
            "TIDEGATE_GATEWAY_PROCESSES": "1",
        } | gateway_env
        process = subprocess.Popen(
            [sys.executable, "-m", "services.gateway"],
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
        )
        try:
            scheme = "https" if "TIDEGATE_TLS_CERT" in gateway_env else "http"
            wait_ready(process, port, Path(state) / "log", scheme)
            yield Gateway(process, port, grpc_port, deployment, redis, Path(state))
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(PATIENCE_S)
            redis.close()
        assert code == 0, (Path(state) / "log").read_text()
        assert not redis.keys(GATEWAY + "*"), "the heartbeat is removed"


@pytest.fixture
async def client(gateway) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the gateway."""
    async with httpx.AsyncClient(base_url=gateway.url, timeout=120) as found:
        yield found


@pytest.fixture
async def client_with_token(gateway) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the gateway with the token of the services."""
    headers = {"Authorization": "Bearer token"}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=PATIENCE_S) as found:
        yield found


@pytest.fixture
async def stub(gateway) -> AsyncIterator[Any]:
    """Yield the stub of the gateway's gRPC API."""
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        yield stubs.GRPCInferenceServiceStub(channel)


@pytest.fixture
async def worker(gateway, make_peer) -> AsyncIterator[Peer]:
    """Start the worker behind the gateway."""
    async with make_peer(gateway.deployment) as found:
        await found.connection.wait_up(PATIENCE_S)
        yield found


@pytest.fixture
def add_model(gateway, table, fresh, until) -> Callable[..., Any]:
    """``await add_model(**fields)`` adds a model, on a Deployment with these fields.

    Both have the name that it gives.
    """

    async def added(**fields: Any) -> str:
        name: str = fresh("model")
        raw, new = orjson.loads(gateway.redis.get(ROUTES)), table(name, **fields)
        raw["n"] += 1
        raw["deployments"] |= new["deployments"]
        raw["endpoints"][name] = new["endpoints"]["digits"]
        gateway.redis.set(ROUTES, orjson.dumps(raw))
        gateway.redis.publish(ROUTES_CHANGED, b"")
        headers = {"Authorization": "Bearer token"}
        async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=PATIENCE_S) as client:

            async def taken() -> bool:
                return name in [m["name"] for m in (await client.get("/v2/models")).json()["models"]]

            await until(taken)
        return name

    return added


@dataclass
class Registry:
    """A registry process with its own state, and a client that holds the service token."""

    http: httpx.Client
    url: str
    log: Path

    def __call__(self, method: str, path: str, body: Any = None, *, status: int | None = None) -> Any:
        answer = self.http.request(method, path, json=body)
        expected = (200, 201, 204) if status is None else (status,)
        assert answer.status_code in expected, f"{answer.status_code}: {answer.text}"
        return answer.json() if answer.content else None

    def key(self, **fields: Any) -> dict[str, Any]:
        """Create a key; return it with its secret."""
        found: dict[str, Any] = self("POST", "/v1/keys", {"name": "test"} | fields)
        return found


@pytest.fixture(scope="module")
def registry(rabbitmq_url) -> Iterator[Registry]:
    """Start the real registry, for gateways whose callers have keys."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as state, (Path(state) / "log").open("wb") as log:
        environment = {
            "TIDEGATE_STATE_DIR": state,
            "TIDEGATE_SERVICE_TOKEN": "token",
            "TIDEGATE_REGISTRY_PORT": str(port),
            "TIDEGATE_AMQP_URL": rabbitmq_url,
            "TIDEGATE_LOG_LEVEL": "DEBUG",
            "TIDEGATE_VERIFICATION": "off",
        }
        command = [sys.executable, "-m", "services.registry"]
        subprocess.run([*command, "migrate"], env={**os.environ, **environment}, check=True)
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_ready(process, port, Path(state) / "log")
            with httpx.Client(
                base_url=url, headers={"Authorization": "Bearer token"}, timeout=PATIENCE_S
            ) as http:
                yield Registry(http, url, Path(state) / "log")
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(PATIENCE_S)
        assert code == 0, (Path(state) / "log").read_text()
