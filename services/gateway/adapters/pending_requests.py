"""Requests that wait for their reply, and what of them goes to one Deployment."""

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
class PendingRequest:
    """A request that waits for its reply; ``done`` is called once, with the reply or what went wrong.

    With ``order`` the caller takes many answers: ``done`` is called with each chunk and then with the end,
    and each chunk moves the deadline: ``timeout_s`` is then the longest time between two.

    ``frame`` is in pieces when it is large, and None while its data is on the way to the blob store; ``size``
    counts that data too, as it is what the worker will hold.
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
    sent: bool = False
    resent: bool = False


@dataclass(slots=True)
class DeploymentQueue:
    """What goes to one Deployment: frames of this turn of the event loop, and its counters."""

    queue: Queue
    waiting: list[PendingRequest] = field(default_factory=list)
    load: GatewayLoad = field(default_factory=GatewayLoad)


def renumbered(frame: bytes | list[Buffer], attempt: int) -> bytes | list[Buffer]:
    """The same frame as another attempt."""
    if isinstance(frame, list):
        return [envelope.with_attempt(frame[0], attempt), *frame[1:]]
    return envelope.with_attempt(frame, attempt)


def message_of(frames: list[bytes | list[Buffer]]) -> bytes | list[Buffer]:
    """Frames as one message; a frame in pieces is alone."""
    if isinstance(frames[0], list):
        return envelope.pack_alone(envelope.REQUESTS, frames[0])
    return envelope.pack(envelope.REQUESTS, [frame for frame in frames if not isinstance(frame, list)])
