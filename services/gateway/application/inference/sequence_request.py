"""A request of a sequence, and its turn to be sent. The requests of a sequence are sent one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.gateway.domain import sequences
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.fair_lane import FlowKey
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute
from services.gateway.domain.sequences import Place, Times
from tidegate.kernel.protocol.sequences import SequenceMark


@dataclass(slots=True, eq=False)
class SequenceRequest:
    """A request of a sequence. ``ends_at``: the deadline in seconds on the monotonic clock.

    If another Deployment runs the sequence, ``route`` is set to that Deployment. Its signature may differ, so
    ``decode`` decodes the body again. The result replaces ``request``.

    ``number``: the position in the order of sending. ``followed``: True if this request starts a sequence and
    another request of the sequence was sent before the answer to this one.
    """

    id: bytes
    endpoint: EndpointRoute
    version: str
    route: DeploymentRoute
    request: Decoded
    decode: Callable[[Contract], Decoded]
    ends_at: float
    flow: FlowKey
    trace: bytes
    decode_s: float
    mark: SequenceMark = field(init=False)
    key: str = field(init=False)
    starts: int = 0
    place: Place | None = None
    number: int = 0
    followed: bool = False

    def forget_data(self) -> None:
        """Drop the tensors of a sent request.

        A request that starts a sequence keeps its tensors, because it may be sent again to another replica.
        """
        if not self.mark.start:
            self.request, self.decode = self.request.without_data(), _forgotten

    def __post_init__(self) -> None:
        assert self.request.sequence is not None
        self.mark = self.request.sequence
        self.key = sequences.key_of(self.endpoint.name, self.version, self.flow.caller, self.mark.id)

    @property
    def left_ms(self) -> float:
        """Return the milliseconds until the deadline, at least 1."""
        return max((self.ends_at - time.monotonic()) * 1e3, 1.0)

    @property
    def idle_ms(self) -> float:
        """Return how long the sequence may be idle at its model, in milliseconds."""
        signature = self.route.contract.signature
        return (
            signature.sequences.idle_ms
            if signature is not None and signature.sequences is not None
            else 1000.0
        )

    def times(self, busy_ms: float) -> Times:
        """Return the times to record. ``busy_ms``: how long the request may still take; 0: it has ended."""
        return Times(int(busy_ms), int(self.idle_ms) + sequences.IDLE_MARGIN_MS)


def _forgotten(_: Contract) -> Decoded:
    raise RuntimeError("the body of this request was dropped")


class Sender(Protocol):
    """The part of the inference core that sends a request to the replica of its sequence."""

    def send(
        self,
        endpoint: EndpointRoute,
        route: DeploymentRoute,
        request: Decoded,
        timeout_ms: float,
        decode_s: float,
        trace: bytes,
        done: Callable[[Any], None],
        flow: FlowKey,
        *,
        id_: bytes = b"",
        keeper: str = "",
    ) -> bytes:
        """Queue an admitted request, and return its id."""

    def stream_from(
        self,
        route: DeploymentRoute,
        request: Decoded,
        timeout_ms: float,
        decode_s: float,
        trace: bytes = b"",
        queued: Callable[[], None] = ...,
        *,
        flow: FlowKey = ...,
        admitted: bool = False,
        id_: bytes = b"",
        keeper: str = "",
    ) -> AsyncGenerator[Any]:
        """Yield the answers of a Deployment to a decoded request."""


class OpenRequests:
    """The sent requests of all sequences that are not answered yet."""

    def __init__(self) -> None:
        self._by_id: dict[bytes, SequenceRequest] = {}
        self._by_key: dict[str, dict[bytes, SequenceRequest]] = {}
        self._starts: dict[str, SequenceRequest] = {}
        self._count = 0

    def get(self, id_: bytes) -> SequenceRequest | None:
        """Return the request with this id; None if it is not open."""
        return self._by_id.get(id_)

    def add(self, request: SequenceRequest) -> None:
        """Add a request that is sent now."""
        self._count += 1
        request.number = self._count
        self._by_id[request.id] = request
        self._by_key.setdefault(request.key, {})[request.id] = request
        if (start := self._starts.get(request.key)) is not None:
            start.followed = True
        if request.mark.start:
            self._starts[request.key] = request

    def remove(self, request: SequenceRequest) -> None:
        """Remove a request, because it is answered or has failed."""
        self._by_id.pop(request.id, None)
        if (same := self._by_key.get(request.key)) is not None:
            same.pop(request.id, None)
            if not same:
                del self._by_key[request.key]
        if self._starts.get(request.key) is request:
            del self._starts[request.key]

    def after(self, request: SequenceRequest) -> list[bytes]:
        """Return the ids of the open requests of the same sequence that were sent after ``request``."""
        same = self._by_key.get(request.key, {}).values()
        return [each.id for each in same if each.number > request.number and each.place == request.place]


@dataclass(slots=True)
class Line:
    """The turns of one sequence's requests. ``users``: the number of turns that have not ended.

    ``lost``: the place at which a request of the sequence was lost during these turns, or None.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    lost: Place | None = None


class Turn:
    """The right to send a request of a sequence now.

    The calling code must call :meth:`release` when the request is in the queue, and :meth:`end` in all cases.
    """

    def __init__(self, lines: dict[str, Line], key: str) -> None:
        self._lines, self._key = lines, key
        self._line = lines.setdefault(key, Line())
        self._line.users += 1
        self._held = self._over = False

    async def take(self) -> None:
        """Wait until the earlier requests of the sequence are in the queue."""
        await self._line.lock.acquire()
        self._held = True

    def lost(self, place: Place) -> bool:
        """Return True if an earlier request at this place was lost while this one waited."""
        return self._line.lost == place

    def release(self) -> None:
        """Let the next request be sent. A second call does nothing."""
        if self._held:
            self._held = False
            self._line.lock.release()

    def end(self) -> None:
        """Release the turn. If no other request of the sequence is left, remove its :class:`Line`.

        A second call does nothing.
        """
        self.release()
        if self._over:
            return
        self._over = True
        self._line.users -= 1
        if not self._line.users:
            self._lines.pop(self._key, None)
