"""The parts of the dispatcher that need no broker: broken streams, and requests that are sent again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel.broker.connection import Channel, Delivery, Unroutable
from tidegate.kernel.broker.topology import requests_queue
from tidegate.kernel.errors import TidegateError, Unavailable, WorkerLost
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply

pytestmark = pytest.mark.unit


class Sent:
    """A channel that keeps the queue and the attempt of each request."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []
        self.failures: list[Any] = []

    async def declare(self, what: Any) -> None:
        """Declare nothing."""

    async def consume(self, *_: Any, **__: Any) -> None:
        """Consume nothing."""

    async def publish(self, body: bytes, **_: Any) -> None:
        """Publish a hint or a cancel."""

    def send(self, body: bytes, *, routing_key: str, on_failure: Any, **_: Any) -> None:
        (frame,) = envelope.unpack(envelope.REQUESTS, body)
        self.requests.append((routing_key, envelope.read_request(frame).attempt))
        self.failures.append(on_failure)


def route(format: str) -> DeploymentRoute:
    found = SimpleNamespace(name="m", format=format, retry_safe=True, queue=requests_queue("m"))
    return cast(DeploymentRoute, found)


@pytest.fixture
async def dispatcher() -> Dispatcher:
    fleet = ReplicaFleet(ready=1)
    claims = cast(Any, SimpleNamespace(needed=lambda _: False))
    found = Dispatcher("amqp://x", b"12345678", lambda _: fleet, claims=claims, answers=cast(Any, None))
    found._loop = asyncio.get_running_loop()
    found.out.channel = cast(Channel, Sent())
    return found


def stream(
    dispatcher: Dispatcher, format: str, replica: str = ""
) -> tuple[bytes, list[Reply | TidegateError]]:
    replies: list[Reply | TidegateError] = []
    id_ = dispatcher.send(
        route(format), 0, b"", [b"x"], 600.0, b"", replies.append, stream=True, replica=replica, wait_ms=100
    )
    return id_, replies


def chunk(dispatcher: Dispatcher, id_: bytes, attempt: int, seq: int) -> None:
    reply = Reply(id_, envelope.CHUNK, attempt, seq, 0, 0, 0, 1, b"", [])
    body = envelope.pack(envelope.REPLIES, [b"".join(envelope.reply_pieces(reply))])
    dispatcher._on_replies(Delivery(body, 1, False, "", "", "", {}))


@pytest.mark.parametrize(("format", "kind"), [("onnx", Unavailable), ("llm", WorkerLost)])
@pytest.mark.parametrize(
    ("attempt", "seq", "problem"),
    [(0, 2, "a part of the stream was lost"), (1, 0, "the worker ended in the middle of the stream")],
)
async def test_only_a_language_models_stream_can_continue(dispatcher, format, kind, attempt, seq, problem):
    id_, replies = stream(dispatcher, format)
    chunk(dispatcher, id_, 0, 0)
    chunk(dispatcher, id_, attempt, seq)
    error = replies[-1]
    assert isinstance(error, TidegateError)
    assert type(error) is kind
    assert (error.reason, error.message) == (kind.reason, f"{problem}: start the stream again")


async def test_a_copy_that_moved_and_one_that_was_sent_again_are_different_attempts(
    dispatcher,
):
    """The worker that gets a moved copy runs it as attempt 1."""
    stream(dispatcher, "llm", replica="r")
    dispatcher._declared.add(requests_queue("m").name)
    channel = dispatcher.out.channel
    dispatcher._resend()
    assert [attempt for _, attempt in channel.requests] == [0, 2]
    assert channel.requests[1][0] == requests_queue("m").name


async def test_a_request_whose_replica_has_gone_goes_to_the_shared_queue(dispatcher):
    stream(dispatcher, "llm", replica="r")
    dispatcher._declared.add(requests_queue("m").name)
    channel = dispatcher.out.channel
    channel.failures[0](Unroutable("no queue"))
    assert channel.requests[1] == (requests_queue("m").name, 0)


@pytest.mark.parametrize(("away_s", "failed"), [(59, False), (61, True)])
async def test_a_gateway_that_was_away_for_long_fails_the_streams_that_may_have_lost_a_chunk(
    dispatcher, away_s, failed
):
    """Workers cancel streams whose reply queue is missing, and their error does not arrive either."""
    begun, replies = stream(dispatcher, "llm")
    _, waiting = stream(dispatcher, "llm")
    chunk(dispatcher, begun, 0, 0)
    await dispatcher._on_back_setup(dispatcher.out.channel)
    assert len(replies) == 1, "the first connection loses nothing"
    dispatcher._on_back_down()
    dispatcher._back_down_at -= away_s
    await dispatcher._on_back_setup(dispatcher.out.channel)
    assert isinstance(replies[-1], WorkerLost) is failed
    assert waiting == []
