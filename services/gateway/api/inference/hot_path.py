"""The hot path: answer inference calls on the connection itself, below ASGI.

ASGI's task, scope and messages cost more time than RabbitMQ's queue does, and an inference call does not need
them. So :class:`HotPathProtocol` extends the asyncio protocol class that handles HTTP in all services of
Tidegate. The parser's callbacks collect an inference call and pass it to :class:`InferenceHandler`. The
response is sent with one write to the connection.

All other requests go through uvicorn to the ASGI app (``asgi_fallback.py``). This includes an inference call
that arrives while the connection waits for another response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from services.gateway.api.body_limits import Body, BodyLimits, Headers
from services.gateway.api.compression import HttpResponse
from services.gateway.api.inference.handler import InferenceHandler
from services.gateway.api.inference.in_place_upload import InPlaceUpload
from services.gateway.api.inference.request_target import (
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
    408,
    "body_too_slow",
    "The request's body arrived too slowly while memory for bodies was short. Send the request again.",
)
_STATUS = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


class HotPathCall:
    """One inference call on a connection. It has the attributes that uvicorn expects of a request cycle.

    ``small`` holds a body that arrives in one small piece, as most do. ``body`` collects any other body.
    """

    __slots__ = (
        "_limits",
        "_on_lost",
        "admitted",
        "body",
        "declared_size",
        "disconnected",
        "headers",
        "id",
        "keep_alive",
        "known",
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
        on_lost: Callable[[HotPathCall], None],
        limits: BodyLimits,
    ) -> None:
        self.target = target
        self.headers = headers
        self.keep_alive = keep_alive
        self.small = b""
        self.body: Body | None = None
        self.known = False  # True: the caller has sent a valid credential
        self.admitted = False  # True: the headers were checked before the body was complete
        # The declared size of the body; 0 if not declared. The parser has made sure that it is a number.
        self.declared_size = int(headers.get(b"content-length", 0))
        self.disconnected = False
        self.response_complete = False
        self.status = 0
        self.id: bytes | None = None
        self._on_lost = on_lost
        self._limits = limits

    @property
    def message_event(self) -> HotPathCall:
        """Return this call: uvicorn calls ``message_event.set()`` when the connection is lost.

        This is a property, because an attribute that refers to its own object is a reference cycle. Only the
        garbage collector would then free the memory of a call.
        """
        return self

    def collected(self) -> Body:
        """Return ``body``. The first call creates it from the bytes in ``small``."""
        if self.body is None:
            self.body = Body(self._limits, self.small, known=self.known)
            self.small = b""
        return self.body

    def release(self) -> None:
        """Free the memory of the body."""
        if self.body is not None:
            self.body.release()
        elif self.small:
            self._limits.bodies.used -= len(self.small)
            self.small = b""

    def set(self) -> None:
        """Cancel the call if it is in flight. uvicorn calls this when the connection is lost."""
        if self.disconnected and not self.response_complete:
            self.release()
            self._on_lost(self)


class HotPathProtocol(Protocol):
    """The asyncio protocol for HTTP that all services use, with a shortcut for inference calls."""

    def __init__(self, inference: InferenceHandler, **options: Any) -> None:
        super().__init__(**options)
        self._inference = inference
        self._direct: HotPathCall | None = None
        self._upload: InPlaceUpload | None = None
        self._unsent = 0

    def data_received(self, data: bytes) -> None:
        """Parse bytes from the client."""
        super().data_received(data)
        call = self._direct
        if call is not None:
            self._unfinished_call(call)

    def _unfinished_call(self, call: HotPathCall) -> None:
        if not call.admitted and (refusal := self._check_headers(call)) is not None:
            self._refuse(call, refusal)
        elif call.declared_size > SCATTER:
            self._receive_in_place(call)

    def _check_headers(self, call: HotPathCall) -> TidegateError | None:
        """Check the headers of a call before its body is complete. Return the error if it is refused."""
        call.admitted = True
        refusal = self._inference.check_headers(call.headers)
        call.known = self._inference.knows(call.headers)
        if refusal is None:
            self._inference.uploads.add(self)
        return refusal

    def _receive_in_place(self, call: HotPathCall) -> None:
        """Receive the rest of a large body without the parser. A new parser reads what follows the body."""

        def done(refusal: TidegateError | None) -> None:
            self._upload = None
            if refusal is None:
                self.new_parser()
                self.on_message_complete()
            else:
                self._refuse(call, refusal)

        body = call.collected()
        if call.declared_size - len(body) <= SCATTER:
            return  # for so few bytes, InPlaceUpload would cost more time than it saves
        refusal = body.expect(call.declared_size)
        if refusal is not None:
            done(refusal)
            return
        self._upload = InPlaceUpload(self, self.transport, body, done)
        self._upload.start()

    def on_headers_complete(self) -> None:
        """Choose the hot path or uvicorn, now that the request's headers are complete.

        Raise Refused if the headers are too large or invalid, or if :meth:`_check_headers` refuses the call.
        """
        target = self._direct_target()
        if target is None:
            self._direct = None
            super().on_headers_complete()
            return
        self.check_head()
        limits, headers = self._inference.limits, dict(self.headers)
        unusual = len(headers) != len(self.headers) or b"upgrade" in headers
        # A request without the header Host must be refused. So replace a missing header by a line feed, which
        # is never a valid host.
        if (unusual or not valid_host(headers.get(b"host", b"\n"))) and self.check_unusual():
            return
        call = HotPathCall(target, headers, self.parser.should_keep_alive(), self._on_lost, limits)
        self._direct = call
        self.cycle = call  # type: ignore[assignment]
        self._at = IN_BODY
        if not call.declared_size:
            self.keep_no_trailers()
        no_room = limits.bodies.used > limits.bodies.limit or limits.answers.used > limits.answers.limit
        # A small body usually arrives with its headers. These headers are checked when the request is
        # complete. Check the headers now if the body is large, if its size is not declared, or if memory is
        # short: a refused body must not use memory.
        early = no_room or call.declared_size > SCATTER or not call.declared_size
        if early and (refusal := self._check_headers(call)) is not None:
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
        """Add a part of the body. If the body is over the limit, refuse it and close the connection."""
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
        """Start the call, because the request is complete."""
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
        """Return how many bytes of bodies have arrived on this connection."""
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
        if self._connections.retiring:
            call.keep_alive = False
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
        """Count ``size`` bytes of a response in the memory budget for answers.

        They are released when the client has read nearly all of them, or when the connection is lost.
        """
        self._unsent += size
        self._inference.limits.answers.force(size)

    def _release_unsent(self) -> None:
        self._inference.limits.answers.release(self._unsent)
        self._unsent = 0

    def resume_writing(self) -> None:
        """Release the memory of the responses, because the client has read nearly all of their bytes."""
        super().resume_writing()
        self._release_unsent()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the incomplete call, and release the memory of the unsent responses."""
        self._stop_receiving()
        self._release_unsent()
        super().connection_lost(exc)
        cycle: object = self.cycle
        if isinstance(cycle, HotPathCall):
            # The call's ``_on_lost`` refers to this object. With ``cycle``, this object would also refer to
            # the call, and that is a reference cycle.
            self.cycle = None  # type: ignore[assignment]

    def _refuse(self, call: HotPathCall, refusal: TidegateError) -> None:
        """Refuse a call before its body is complete.

        Then read and drop the rest of the body for a limited time, and close the connection.
        """
        call.keep_alive = False
        self._write(call, self._inference.refuse(call.target, call.headers, refusal))
        self._stop_receiving()
        self.linger()

    def _refuse_and_stop(self, call: HotPathCall, refusal: TidegateError) -> None:
        """Refuse a call in a callback of the parser. Then stop the parser with an exception."""
        self._refuse(call, refusal)
        raise Refused(Refusal(0, refusal.reason, refusal.message))

    def _stop_receiving(self) -> None:
        """Forget the incomplete call, if any."""
        self._inference.uploads.discard(self)
        self._direct = None
        if self._upload is not None:
            self._upload.stop()
            self._upload = None

    def reject(self, refusal: Refusal) -> None:
        """Refuse the request that arrives now, and close the connection."""
        self._stop_receiving()
        super().reject(refusal)

    def note(self, refusal: Refusal, rid: str) -> None:
        """Log a request that this protocol refused, for example because the request is malformed."""
        self._inference.log_rejection(refusal, rid)

    def evict(self) -> None:
        """Refuse the incomplete body, because other requests need its memory."""
        self.reject(_EVICTED)

    def unfinished(self) -> Unfinished:
        """Return the progress of the incomplete body.

        When memory for bodies is short, this progress decides which bodies are dropped.
        """
        call = self._direct
        if call is None or (call.body is not None and call.body.taking):
            return Unfinished(0, 0.0, 0, True)
        held = len(call.small) if call.body is None else call.body.held
        return Unfinished(held, *self.pace(), call.known)

    def knows_caller(self) -> bool:
        """Return True if the last request certainly had a valid credential."""
        cycle: Any = self.cycle
        if isinstance(cycle, HotPathCall):
            # Every route refuses an invalid credential. So if a request with a credential got status 200, its
            # credential is valid.
            answered = cycle.status == HTTPStatus.OK and b"authorization" in cycle.headers
            return answered or self._inference.knows(cycle.headers)
        return cycle is not None and self._inference.knows(dict(cycle.scope["headers"]))

    def _on_lost(self, call: HotPathCall) -> None:
        if call.id is not None:
            self._inference.abandon(call.id, call.target, call.headers)
