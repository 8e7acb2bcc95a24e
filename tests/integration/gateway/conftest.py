"""A small worker that speaks the real protocol over the real broker, and a dispatcher in front of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.domain.admission import UNKNOWN_FLEET, Fleet
from services.gateway.domain.routing import DeploymentRoute, compile_table
from tidegate.broker import Delivery, Link, Session
from tidegate.protocol import envelope
from tidegate.protocol.envelope import Request
from tidegate.topology import (
    CANCELS,
    EVENTS,
    Queue,
    cancels_queue,
    events_queue,
    requests_queue,
)

SIGNATURE = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [2]}],
    "max_batch_size": 8,
}


def echo(request: Request) -> bytes:
    """The answer of the identity: what came in as ``x`` goes out as ``y``."""
    inputs = envelope.read_call_key(request.key).inputs
    key = envelope.result_key((inputs[0]._replace(name="y"),))
    return envelope.reply_frame(
        request.id, request.attempt, request.rows, key, list(request.data[:1]), wait_us=100, compute_us=200
    )


def silent(_: Request) -> None:
    """Never an answer."""


class Peer:
    """A worker: takes envelopes, answers each request with ``answer``; keeps all that it saw."""

    def __init__(self, url: str, deployment: str) -> None:
        self.queue: Queue = requests_queue(deployment)
        self.answer: Callable[[Request], bytes | None] = echo
        self.envelopes: list[list[Request]] = []
        self.deliveries: list[Delivery] = []
        self.cancelled: list[bytes] = []
        self.demanded: list[str] = []
        self._cancels = cancels_queue(deployment, os.urandom(4).hex())
        self._events = events_queue("test", os.urandom(4).hex())
        self.link = Link(url, "peer", self._setup)

    @property
    def requests(self) -> list[Request]:
        return [request for found in self.envelopes for request in found]

    async def _setup(self, session: Session) -> None:
        async def on_requests(delivery: Delivery) -> None:
            await self._on_requests(session, delivery)

        for queue in (self.queue, self._cancels, self._events):
            await session.declare(queue)
        for exchange in (CANCELS, EVENTS):
            await session.declare(exchange)
        await session.bind(self._cancels, CANCELS)
        await session.bind(self._events, EVENTS, "demand.#")
        await session.consume(self._cancels, self._on_cancels, prefetch=100, no_ack=True)
        await session.consume(self._events, self._on_demand, prefetch=100, no_ack=True)
        await session.consume(self.queue, on_requests, prefetch=1000)

    async def _on_requests(self, session: Session, delivery: Delivery) -> None:
        found = [envelope.read_request(f) for f in envelope.unpack(envelope.REQUESTS, delivery.body)]
        self.envelopes.append(found)
        self.deliveries.append(delivery)
        await session.ack(delivery.tag)
        replies = [frame for request in found if (frame := self.answer(request)) is not None]
        if replies:
            assert delivery.reply_to is not None
            await session.publish(
                envelope.pack(envelope.REPLIES, list(replies)), routing_key=delivery.reply_to
            )

    async def _on_cancels(self, delivery: Delivery) -> None:
        self.cancelled += map(bytes, envelope.unpack(envelope.CANCELS, delivery.body))

    async def _on_demand(self, delivery: Delivery) -> None:
        self.demanded.append(delivery.routing_key.removeprefix("demand."))


def make_table(deployment: str, **given: Any) -> dict[str, Any]:
    """A route table with an endpoint ``digits`` on one Deployment."""
    entry = {
        "model": "digits",
        "version": 1,
        "queue": requests_queue(deployment).name,
        "format": "onnx",
        "signature": SIGNATURE,
        "max_queue": 10_000,
        "max_concurrency": None,
        "retry": "safe",
        "wakeable": True,
        "ready": 1,
        **given,
    }
    endpoint = {
        "targets": [{"deployment": deployment, "weight": 100}],
        "versions": {"1": deployment},
        "default_timeout_ms": 20_000,
    }
    return {"epoch": "e", "n": 1, "endpoints": {"digits": endpoint}, "deployments": {deployment: entry}}


class Fleets(dict[str, Fleet]):
    """What the dispatcher is told of the workers."""

    def __call__(self, name: str) -> Fleet:
        return self.get(name, UNKNOWN_FLEET)


@pytest.fixture
def deployment(fresh) -> str:
    """A Deployment's name of this test's own."""
    found: str = fresh("digits")
    return found


@pytest.fixture(scope="session")
def table() -> Callable[..., dict[str, Any]]:
    """``table(deployment, **fields)``: a route table as the router publishes it."""
    return make_table


@pytest.fixture
def route(deployment) -> Callable[..., DeploymentRoute]:
    """``route(**fields)``: the test's Deployment as the gateway knows it."""
    return lambda **given: compile_table(make_table(deployment, **given)).pick("digits", "", 0.0)[1]


@pytest.fixture
async def peer(rabbitmq_url, deployment) -> AsyncIterator[Peer]:
    """The test's worker, at work."""
    found = Peer(rabbitmq_url, deployment)
    async with found.link:
        await found.link.wait_up(20)
        yield found


@pytest.fixture
def make_peer(rabbitmq_url) -> Callable[[str], Any]:
    """``async with make_peer(deployment) as peer``: a worker that comes when the test says."""

    @asynccontextmanager
    async def opened(deployment: str) -> AsyncIterator[Peer]:
        found = Peer(rabbitmq_url, deployment)
        async with found.link:
            yield found

    return opened


@pytest.fixture
def fleets() -> Fleets:
    """Empty: nothing is known of the workers."""
    return Fleets()


@pytest.fixture
async def dispatch(rabbitmq_url, fleets) -> AsyncIterator[Callable[..., Any]]:
    """Opens a dispatcher that is up, and stops it after the test."""
    async with AsyncExitStack() as stack:

        async def opened(url: str = rabbitmq_url) -> Dispatcher:
            found = Dispatcher(url, os.urandom(8), fleets)
            found.start()
            stack.push_async_callback(found.stop)
            await found.out.wait_up(20)
            await found.back.wait_up(20)
            return found

        yield opened
