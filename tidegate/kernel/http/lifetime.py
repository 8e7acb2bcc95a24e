"""The base class of HTTP connections: phases, timeouts, refusals and closing."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tidegate.kernel import telemetry
from tidegate.kernel.http import answers, heads
from tidegate.kernel.http.answers import Refusal
from tidegate.kernel.http.connections import CLOSED, Connections
from tidegate.kernel.http.timeouts import Phase, Standing, TimeoutDecision, decide

log = telemetry.logger(__name__)

# The position of the parser: between two requests, in a head, or in a body.
BETWEEN, IN_HEAD, IN_BODY = 0, 1, 2


class Refused(Exception):
    """An exception that stops the parser, so that the request is refused."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class Trailers:
    """A list that counts a request's trailers and drops them.

    When the head is complete, this list replaces the list to which header fields are appended.
    """

    __slots__ = ("_bytes", "_fields", "_refusal", "head")

    def __init__(self, head: heads.Fields, head_bytes: int, max_bytes: int, max_fields: int) -> None:
        self.head = head
        self._fields = max_fields - len(head)
        self._bytes = max_bytes - head_bytes
        self._refusal = heads.too_large(max_bytes, max_fields)

    def append(self, field: tuple[bytes, bytes]) -> None:
        """Count a trailer. Raises Refused above the limit."""
        self._fields -= 1
        self._bytes -= len(field[0]) + len(field[1]) + 4
        if self._fields < 0 or self._bytes < 0:
            raise Refused(self._refusal)


class Lifetime(HttpToolsProtocol):
    """An HTTP connection that :class:`Connections` closes after a timeout, or if too many are open."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._connections = connections
        self._at = BETWEEN
        self._deaf = False  # True: discard all further bytes
        self._closing = False
        self._previous: Any = None  # the request before the current one
        self._rejected: Refusal | None = None  # refusal that is sent after the pending answers
        self.held_head = 0  # bytes of an incomplete head
        self._pending = 0  # bytes of the head that are counted in the process's total
        self._body = 0  # bytes of bodies that went to the ASGI app

        # For the sweeps: the phase that the last sweep saw, and the time and the byte count when this phase
        # began.
        self.since = connections.now
        self._phase: Phase | None = None
        self._token: Any = None
        self._mark = self._pauses = 0

    def phase(self) -> Phase:
        """Return the current phase of this connection."""
        if self._closing or self.transport.is_closing():
            return Phase.CLOSING
        if self.flow.write_paused:
            return Phase.UNREAD
        if self._at and not self.flow.read_paused:
            return Phase.HEAD if self._at == IN_HEAD else Phase.BODY
        if self.cycle is not None and not self.cycle.response_complete:
            return Phase.BUSY
        return Phase.SILENT if self.headers is None else Phase.IDLE

    def knows_caller(self) -> bool:
        """Return True if the caller has sent a valid credential."""
        return False

    def standing(self) -> Standing:
        """Return the rank of this connection. If too many are open, the rank decides which are closed."""
        phase = self.phase()
        seen = phase is self._phase and self._token is self.headers
        return Standing(phase, self.knows_caller(), self.since if seen else self._connections.now)

    def pace(self) -> tuple[float, int]:
        """Return for how long the current body was measured, and how many bytes arrived in this time.

        The sweeps measure the time, in seconds. Both numbers are 0 if no sweep has seen this body.
        """
        if self._phase is not Phase.BODY or self._token is not self.headers:
            return 0.0, 0
        return self._connections.now - self.since, self.body_received() - self._mark

    def check(self, now: float) -> None:
        """Close this connection if a timeout has passed.

        ``now``: the time on the clock of :class:`Connections`.
        """
        phase = self.phase()
        token: Any
        if phase is Phase.UNREAD:
            token, progress = self._pauses, -self.transport.get_write_buffer_size()
        else:
            token, progress = self.headers, self.body_received()
        if phase is not self._phase or token is not self._token:
            self._phase, self._token, self._mark, self.since = phase, token, progress, now
            return
        verdict = decide(phase, now - self.since, progress - self._mark, self._connections.limits)
        if verdict is TimeoutDecision.WAIT:
            return
        self._mark, self.since = progress, now
        if verdict is TimeoutDecision.CLOSE:
            CLOSED.labels("idle").inc()
            self.transport.close()
        elif verdict is TimeoutDecision.ABORT:
            if phase is Phase.UNREAD:
                CLOSED.labels("unread").inc()
            if phase is Phase.CLOSING and not self.transport.is_closing():
                self.transport.close()
            else:
                self.transport.abort()
        elif verdict is not TimeoutDecision.RENEW:
            self.reject(_LATE[verdict])

    def body_received(self) -> int:
        """Return how many bytes of bodies this connection has received."""
        return self._body

    def release_head(self) -> None:
        """Subtract the incomplete head of this connection from the process's total."""
        self._connections.pending_heads -= self._pending
        self.held_head = self._pending = 0

    def reject(self, refusal: Refusal) -> None:
        """Refuse the current request and close. Earlier requests are answered first."""
        self._deaf = True
        self.release_head()
        CLOSED.labels(refusal.reason).inc()
        cycle = self.cycle
        if self._at == IN_BODY and self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()
            self.cycle = self._previous
            self._rejected = refusal
        elif cycle is None or cycle.response_complete:
            if self._at == IN_BODY:
                self.linger()  # the answer to this request was already sent
            else:
                self.answer(refusal)
        elif self._at == IN_BODY:
            cycle.disconnected = True
            cycle.message_event.set()
            if getattr(cycle, "response_started", False):
                self.linger()
            else:
                self.answer(refusal)
        else:
            self._rejected = refusal
        self._at = BETWEEN

    def answer(self, refusal: Refusal) -> None:
        """Send the answer for a refusal, and close."""
        if self.transport.is_closing():
            return
        headers: Any = self.headers
        fields = headers.head if isinstance(headers, Trailers) else headers or ()
        given = next((value for name, value in fields if name == b"x-request-id"), b"")
        rid = given.decode("latin-1")[:128] or answers.new_request_id()
        self.note(refusal, rid)
        self.transport.write(answers.raw(refusal, rid))
        self.linger()

    def note(self, refusal: Refusal, rid: str) -> None:
        """Log a refusal. ``rid`` is the id in its answer."""
        log.debug("connection refused", extra={"status": refusal.status, "reason": refusal.reason})

    def linger(self) -> None:
        """Close after ``LINGER_S``, and discard all bytes that arrive until then.

        Closing immediately would reset the connection. Then a client that is still sending would not get its
        answer.
        """
        self._deaf = self._closing = True
        self.flow.resume_reading()
        if not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()

    def shed(self, reason: str) -> None:
        """Close immediately. The metric of closed connections counts this under the label ``reason``."""
        CLOSED.labels(reason).inc()
        self._deaf = True
        self.release_head()
        self.transport.abort()


_LATE = {
    TimeoutDecision.HEADER_TIMEOUT: Refusal(
        408, "header_timeout", "The request's head did not arrive in time (TIDEGATE_HTTP_HEADER_TIMEOUT_S)."
    ),
    TimeoutDecision.TOO_SLOW: Refusal(
        408, "body_too_slow", "The request's body came too slowly (TIDEGATE_HTTP_BODY_BYTES_PER_S)."
    ),
}
