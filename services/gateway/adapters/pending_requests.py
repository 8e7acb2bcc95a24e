"""Requests in flight, and the queue of requests to each Deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from services.gateway.domain.chunk_order import ChunkOrder
from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel.broker.topology import Queue
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply
from tidegate.kernel.protocol.presence import GatewayLoad

ReplyOrError = Reply | TidegateError
OnReply = Callable[[ReplyOrError], None]


@dataclass(slots=True)
class Lane:
    """The queues of a request to a language model: its band's shared one, and that of a preferred replica.

    In the queue of the replica (``own``) it waits for up to ``wait_ms``. None: it prefers no replica.
    """

    shared: Queue
    own: Queue | None = None
    wait_ms: float = 0.0


@dataclass(slots=True)
class PendingRequest:
    """A request that waits for its reply. ``done`` is called once, with the reply or an error.

    A stream has an ``order``. Then ``done`` is called with each chunk and with the end. ``timeout_s``
    limits the time between two chunks, so each chunk moves ``deadline``.

    ``frame`` is a list of pieces if it is large. It is None while the data is uploaded to the blob store,
    and after a stream's first chunk. ``size`` includes uploaded data, because the worker will hold it.

    A request to a language model has a ``lane``, and a message of its own.
    """

    id: bytes
    done: OnReply
    route: DeploymentRoute
    frame: bytes | list[Buffer] | None
    size: int
    deadline: float
    timer: asyncio.TimerHandle
    timeout_s: float
    order: ChunkOrder | None = None
    claim: bytes | None = None
    lane: Lane | None = None
    sent: bool = False
    resent: bool = False


@dataclass(slots=True)
class DeploymentQueue:
    """The requests to one Deployment that are not published yet, and the Deployment's counters."""

    amqp_queue: Queue
    waiting: list[PendingRequest] = field(default_factory=list)
    load: GatewayLoad = field(default_factory=GatewayLoad)


def renumbered(frame: bytes | list[Buffer], attempt: int) -> bytes | list[Buffer]:
    """Return the frame with another attempt number."""
    if isinstance(frame, list):
        return [envelope.with_attempt(frame[0], attempt), *frame[1:]]
    return envelope.with_attempt(frame, attempt)


def message_of(frames: list[bytes | list[Buffer]]) -> bytes | list[Buffer]:
    """Return frames as one message. A frame in pieces must be the only frame."""
    if isinstance(frames[0], list):
        return envelope.pack_alone(envelope.REQUESTS, frames[0])
    return envelope.pack(envelope.REQUESTS, [frame for frame in frames if not isinstance(frame, list)])
