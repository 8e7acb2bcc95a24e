"""Publish copies of requests for shadow traffic, and pass on the answers to the copies.

A copy that is lost is not sent again. Copies have ids of their own, so no reply to a copy reaches a caller. A
copy counts neither as a request of its Deployment nor as demand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.domain.envelope_size import frames_per_envelope, split
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute
from services.gateway.domain.shadow_policy import NO_ANSWER, NOT_SENT, WAIT_S
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply
from tidegate.kernel.protocol.tenant import tenant_of

# Replicas record their working time for each caller. For copies, they record it under this name, which no API
# key can have.
CALLER = "(shadow)"
# The ids of copies are counted from this number. The counter of requests never grows so large, so no copy has
# the id of a request.
_OF_COPIES = 1 << 63


@dataclass(slots=True)
class Copy:
    """A copy of a request.

    ``done`` is called once. It gets the reply, or a reason and a message if there is no reply. ``timeout_s``:
    the longest wait for the answer. ``deadline``: when this wait ends, on the clock of ``time.monotonic``; it
    is set when the copy is sent.
    """

    endpoint: str
    route: DeploymentRoute
    rows: int
    key: bytes
    data: list[Buffer]
    trace: bytes
    timeout_s: float
    done: Callable[[Reply | tuple[str, str]], None]
    deadline: float = 0.0

    @property
    def size(self) -> int:
        """Return the size of the copy's tensors in bytes."""
        return sum(map(len, self.data))


class CopyPublisher:
    """A publisher of copies. It uses the dispatcher's connection and the dispatcher's reply queue."""

    def __init__(self, dispatcher: Dispatcher, incarnation: bytes) -> None:
        self._dispatcher = dispatcher
        self._incarnation = incarnation
        self._counter = _OF_COPIES
        self._in_flight: dict[bytes, Copy] = {}
        self._by_deployment: dict[str, int] = {}
        dispatcher.on_other_reply = self._on_reply

    @property
    def connected(self) -> bool:
        """Return True if copies can be sent now."""
        channel = self._dispatcher.out.channel
        return channel is not None and not channel.blocked

    def in_flight(self, deployment: str) -> int:
        """Return how many copies from this process wait for an answer from a Deployment."""
        return self._by_deployment.get(deployment, 0)

    def publish(self, copies: Sequence[Copy], fleet: ReplicaFleet) -> None:
        """Publish copies to one Deployment.

        ``fleet``: a summary of the Deployment's replicas. It limits how many copies share an envelope: the
        limit depends on the number of replicas and on their speed.
        """
        now = time.monotonic()
        frames: list[tuple[bytes, list[Buffer]]] = []
        for copy in copies:
            self._counter += 1
            id_ = self._incarnation + self._counter.to_bytes(8, "little")
            copy.deadline = now + copy.timeout_s
            self._in_flight[id_] = copy
            self._by_deployment[copy.route.name] = self.in_flight(copy.route.name) + 1
            deadline_ms = int((time.time() + copy.timeout_s) * 1e3)
            # If a model call with several requests fails, the worker may retry each of them alone, unless the
            # model forbids retries.
            flags = envelope.COPY | (envelope.RETRY_SAFE if copy.route.retry_safe else 0)
            tenant = tenant_of(CALLER, copy.endpoint)
            head = envelope.request_head(
                id_,
                deadline_ms,
                copy.rows,
                copy.key,
                copy.data,
                tenant=tenant,
                trace=copy.trace,
                flags=flags,
            )
            frames.append((id_, [head, *copy.data]))
        most = frames_per_envelope(len(frames), fleet)
        queue = copies[0].route.queue.name
        for start, end in split([copy.size for copy in copies], most):
            self._send(queue, frames[start:end])

    def _send(self, queue: str, frames: Sequence[tuple[bytes, list[Buffer]]]) -> None:
        on_failure = partial(self._on_failure, [id_ for id_, _ in frames])
        channel = self._dispatcher.out.channel
        if channel is None:
            on_failure(Unavailable("the connection to the broker was lost"))
            return
        body: bytes | list[Buffer]
        if sum(map(len, frames[0][1])) > envelope.LARGE:
            body = envelope.pack_alone(envelope.REQUESTS, frames[0][1])
        else:
            body = envelope.pack(envelope.REQUESTS, [b"".join(pieces) for _, pieces in frames])
        try:
            channel.send(
                body,
                routing_key=queue,
                expiration_ms=WAIT_S * 1e3,
                reply_to=self._dispatcher.reply_to,
                mandatory=True,
                on_failure=on_failure,
            )
        except Unavailable as error:
            on_failure(error)

    def expire(self) -> None:
        """Give up the copies whose deadline has passed."""
        now = time.monotonic()
        for id_ in [id_ for id_, copy in self._in_flight.items() if copy.deadline <= now]:
            self._settle(id_, (NO_ANSWER, ""))

    def _on_failure(self, ids: Sequence[bytes], error: Unavailable) -> None:
        for id_ in ids:
            self._settle(id_, (NOT_SENT, error.message))

    def _on_reply(self, reply: Reply) -> None:
        if reply.status in (envelope.OK, envelope.FAILED):
            self._settle(reply.id, reply)

    def _settle(self, id_: bytes, outcome: Reply | tuple[str, str]) -> None:
        copy = self._in_flight.pop(id_, None)
        if copy is not None:
            self._by_deployment[copy.route.name] -= 1
            copy.done(outcome)
