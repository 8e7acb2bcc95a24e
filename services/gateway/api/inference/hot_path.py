"""The hot path: inference calls answered on the connection itself, below ASGI.

An inference call needs nothing that ASGI brings (a task, a scope, messages), and these cost more than the
queue does. So this class extends the HTTP protocol of all services: the parser's callbacks collect a plain
inference call and hand it to :class:`InferenceHandler`, and the response is one write. Everything else (other
paths, a request that arrives while another is unanswered on the connection) goes through uvicorn to the ASGI
app (``asgi_fallback.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from services.gateway.api.body_limits import Body, BodyLimits, Headers
from services.gateway.api.compression import HttpResponse
from services.gateway.api.inference.handler import InferenceHandler
from services.gateway.api.inference.in_place_upload import InPlaceUpload
from services.gateway.api.inference.target import (
    INFER_PREFIX,
    INFER_SUFFIX,
    JOBS_PATH,
    SUBMIT_JOB,
    Infer,
    Target,
)
from services.gateway.domain.eviction import Unfinished
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.answers import Refusal
from tidegate.kernel.http.heads import valid_host
from tidegate.kernel.http.lifetime import BETWEEN, IN_BODY, Refused
from tidegate.kernel.http.protocol import Protocol
from tidegate.kernel.protocol.envelope import Buffer

_PREFIX, _SUFFIX, _JOBS = INFER_PREFIX.encode(), INFER_SUFFIX.encode(), JOBS_PATH.encode()
SCATTER = 64 * 1024

_EVICTED = Refusal(
    408, "body_too_slow", "The request's body came too slowly while memory for bodies was short; try again."
)
_STATUS = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


class HotPathCall:
    """One call on a connection; to uvicorn it looks like its own request cycle.

    A body that comes in one small piece, as most do, is ``small``; any other is collected in ``body``.
    """

    __slots__ = (
        "_gone",
        "_limits",
        "admitted",
        "body",
        "disconnected",
        "expected",
        "headers",
        "id",
        "keep_alive",
        "known",
        "message_event",
        "response_complete",
        "small",
        "status",
        "target",
    )

    def __init__(
        self,
        target: Target,
        headers: Headers,
        keep_alive: bool,
        gone: Callable[[HotPathCall], None],
        limits: BodyLimits,
    ) -> None:
        self.target = target
        self.headers = headers
        self.keep_alive = keep_alive
        self.small = b""
        self.body: Body | None = None
        self.known = False  # its caller has shown a good credential
        self.admitted = False  # its caller was looked at before its body has come
        # The parser has seen that it is a number; 0: not known before.
        self.expected = int(headers.get(b"content-length", 0))
        self.disconnected = False
        self.response_complete = False
        self.status = 0
        self.id: bytes | None = None
        self.message_event = self  # uvicorn calls message_event.set() when the connection is lost
        self._gone = gone
        self._limits = limits

    def collected(self) -> Body:
        """The body from now on, as one that is not small."""
        if self.body is None:
            self.body = Body(self._limits, self.small, known=self.known)
            self.small = b""
        return self.body

    def release(self) -> None:
        """Its body is no longer needed."""
        if self.body is not None:
            self.body.release()
        elif self.small:
            self._limits.bodies.used -= len(self.small)
            self.small = b""

    def set(self) -> None:
        """The connection was lost; if the call is under way its caller has gone."""
        if self.disconnected and not self.response_complete:
            self.release()
            self._gone(self)


class HotPathProtocol(Protocol):
    """The HTTP protocol of all services with a short way for inference calls."""

    def __init__(self, inference: InferenceHandler, **given: Any) -> None:
        super().__init__(**given)
        self._inference = inference
        self._direct: HotPathCall | None = None
        self._upload: InPlaceUpload | None = None
        self._unsent = 0

    def data_received(self, data: bytes) -> None:
        """Take bytes from the client."""
        super().data_received(data)
        call = self._direct
        if call is not None:
            self._unfinished_call(call)

    def _unfinished_call(self, call: HotPathCall) -> None:
        if not call.admitted and (refusal := self._admit(call)) is not None:
            self._refuse(call, refusal)
        elif call.expected > SCATTER:
            self._receive_in_place(call)

    def _admit(self, call: HotPathCall) -> TidegateError | None:
        """Look at the caller of a body that has not come yet, or not all of it."""
        call.admitted = True
        refusal = self._inference.at_head(call.headers)
        call.known = self._inference.knows(call.headers)
        if refusal is None:
            self._inference.uploads.add(self)
        return refusal

    def _receive_in_place(self, call: HotPathCall) -> None:
        """The rest of a large body comes without the parser, which begins anew behind it."""

        def done(refusal: TidegateError | None) -> None:
            self._upload = None
            if refusal is None:
                self.new_parser()
                self.on_message_complete()
            else:
                self._refuse(call, refusal)

        body = call.collected()
        if call.expected - len(body) <= SCATTER:
            return  # next to nothing is missing
        refusal = body.expect(call.expected)
        if refusal is not None:
            done(refusal)
            return
        self._upload = InPlaceUpload(self, self.transport, body, done)
        self._upload.start()

    def on_headers_complete(self) -> None:
        """Choose the way of a request whose head is there; raise Refused."""
        target = self._direct_target()
        if target is None:
            self._direct = None
            super().on_headers_complete()
            return
        self.check_head()
        limits, headers = self._inference.limits, dict(self.headers)
        unusual = len(headers) != len(self.headers) or b"upgrade" in headers
        # A line feed is in no header: it stands for a Host that is missing.
        if (unusual or not valid_host(headers.get(b"host", b"\n"))) and self.check_unusual():
            return
        call = HotPathCall(target, headers, self.parser.should_keep_alive(), self._on_gone, limits)
        self._direct = call
        self.cycle = call  # type: ignore[assignment]
        self._at = IN_BODY
        if not call.expected:
            self.keep_no_trailers()
        tight = limits.bodies.used > limits.bodies.limit or limits.answers.used > limits.answers.limit
        # A small body mostly comes with its head: all else is let in, or refused, before it comes.
        early = tight or call.expected > SCATTER or not call.expected
        if early and (refusal := self._admit(call)) is not None:
            self._refuse_and_stop(call, refusal)
        elif self.expect_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _direct_target(self) -> Target | None:
        job = self.url == _JOBS
        infers = self.url.endswith(_SUFFIX) and self.url.startswith(_PREFIX) and b"%" not in self.url
        if not job and not infers:
            return None
        free = self.cycle is None or self.cycle.response_complete
        if not free or self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return None
        return SUBMIT_JOB if job else Infer.named(self.url[len(_PREFIX) : -len(_SUFFIX)].decode("latin-1"))

    def on_body(self, body: bytes) -> None:
        """A part of the body; one over the limit is refused at once and the connection closed."""
        call = self._direct
        if call is None:
            super().on_body(body)
            return
        if not call.small and call.body is None and len(body) <= SCATTER:
            call.small = body
            self._inference.limits.bodies.used += len(body)
            return
        refusal = call.collected().add(body)
        if refusal is not None:
            self._refuse_and_stop(call, refusal)

    def on_message_complete(self) -> None:
        """The request is whole: begin."""
        call = self._direct
        if call is None:
            super().on_message_complete()
            return
        self._direct = None
        self._at = BETWEEN
        if call.admitted:
            self._inference.uploads.discard(self)
        call.id = self._inference.begin(
            call.target,
            call.headers,
            call.small if call.body is None else call.body.whole(),
            lambda response: self._write(call, response),
        )

    def body_received(self) -> int:
        """Return how many bytes of bodies this connection has brought."""
        call = self._direct
        if call is None:
            return super().body_received()
        return super().body_received() + (len(call.small) if call.body is None else len(call.body))

    def _write(self, call: HotPathCall, response: HttpResponse) -> None:
        call.response_complete = True
        call.status = response.status
        call.release()
        if call.disconnected or self.transport.is_closing():
            return
        parts = [_STATUS[response.status]]
        for name, value in self.server_state.default_headers:
            parts += (name, b": ", value, b"\r\n")
        for name, value in response.headers:
            parts += (name, b": ", value, b"\r\n")
        parts.append(b"\r\n" if call.keep_alive else b"connection: close\r\n\r\n")
        parts.append(response.body)
        if response.tail:
            self._write_tail(b"".join(parts), response.tail)
        else:
            self.transport.write(b"".join(parts))
        if self.flow.write_paused:
            self._hold(len(response.body) + sum(map(len, response.tail)))
        if not call.keep_alive and self._direct is not call:
            self.transport.close()
        self.answered()

    def _write_tail(self, head: bytes, tail: Sequence[Buffer]) -> None:
        if sum(map(len, tail)) < SCATTER:
            self.transport.write(b"".join((head, *tail)))
        else:
            self.transport.writelines([head, *tail])

    def _hold(self, size: int) -> None:
        """An answer waits in the socket's buffer: it counts until its reader has taken nearly all of it."""
        self._unsent += size
        self._inference.limits.answers.force(size)

    def _let_go(self) -> None:
        self._inference.limits.answers.give(self._unsent)
        self._unsent = 0

    def resume_writing(self) -> None:
        """The socket's buffer is nearly empty."""
        super().resume_writing()
        self._let_go()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, and what it held."""
        self._leave()
        self._let_go()
        super().connection_lost(exc)

    def _refuse(self, call: HotPathCall, refusal: TidegateError) -> None:
        """Answer an upload before its end, and read on for a while without keeping anything."""
        call.keep_alive = False
        self._write(call, self._inference.refuse(call.target, call.headers, refusal))
        self._leave()
        self.linger()

    def _refuse_and_stop(self, call: HotPathCall, refusal: TidegateError) -> None:
        """The same from inside of the parser, which would go on with the rest of what it has."""
        self._refuse(call, refusal)
        raise Refused(Refusal(0, refusal.reason, refusal.message))

    def _leave(self) -> None:
        """Its call, if one is coming in, comes in no further."""
        self._inference.uploads.discard(self)
        self._direct = None
        if self._upload is not None:
            self._upload.stop()
            self._upload = None

    def reject(self, refusal: Refusal) -> None:
        """Refuse what comes in now and close."""
        self._leave()
        super().reject(refusal)

    def note(self, refusal: Refusal, rid: str) -> None:
        """Log what was no request, or did not become one, as any other that is refused."""
        self._inference.rejected(refusal, rid)

    def evict(self) -> None:
        """Refuse an unfinished body: its memory is needed."""
        self.reject(_EVICTED)

    def unfinished(self) -> Unfinished:
        """Return the body that is coming in, as one that may have to go."""
        call = self._direct
        if call is None or (call.body is not None and call.body.taking):
            return Unfinished(0, 0.0, 0, True)
        held = len(call.small) if call.body is None else call.body.held
        return Unfinished(held, *self.pace(), call.known)

    def knows_caller(self) -> bool:
        """Return True if the credential of the last request was good, as far as memory tells."""
        cycle: Any = self.cycle
        if isinstance(cycle, HotPathCall):
            # A credential that is not good is refused wherever it is shown.
            answered = cycle.status == HTTPStatus.OK and b"authorization" in cycle.headers
            return answered or self._inference.knows(cycle.headers)
        return cycle is not None and self._inference.knows(dict(cycle.scope["headers"]))

    def _on_gone(self, call: HotPathCall) -> None:
        if call.id is not None:
            self._inference.abandon(call.id, call.target, call.headers)
