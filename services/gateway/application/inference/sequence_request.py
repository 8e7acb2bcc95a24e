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
from services.gateway.domain.sequences import Place
from tidegate.kernel.protocol.sequences import SequenceMark


@dataclass(slots=True, eq=False)
class SequenceRequest:
    """A request of a sequence. ``ends_at``: the deadline in seconds on the monotonic clock.

    If another Deployment runs the sequence, ``route`` is set to that Deployment. Its signature may differ, so
    ``decode`` decodes the body again. The result replaces ``request``.
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


@dataclass(slots=True)
class Line:
    """The requests of one sequence that wait to be sent. ``users``: the number of these requests."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Turn:
    """The right to send a request of a sequence now.

    The calling code must call :meth:`release` when the request is in the queue.
    """

    def __init__(self, lines: dict[str, Line], key: str) -> None:
        self._lines, self._key = lines, key
        self._line = lines.setdefault(key, Line())
        self._line.users += 1
        self._held = False

    async def take(self) -> None:
        """Wait until the earlier requests of the sequence are in the queue."""
        await self._line.lock.acquire()
        self._held = True

    def release(self) -> None:
        """Let the next request be sent. A second call does nothing."""
        if self._held:
            self._held = False
            self._line.lock.release()

    def end(self) -> None:
        """Release the turn. If no other request of the sequence is left, remove its :class:`Line`."""
        self.release()
        self._line.users -= 1
        if not self._line.users:
            self._lines.pop(self._key, None)
