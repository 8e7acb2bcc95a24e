"""The hot path: inference calls answered on the connection itself, below ASGI.

An inference call needs none of what ASGI brings (a task, a scope, messages), and those cost more than the
queue does. So uvicorn's own HTTP protocol is extended: a plain inference call is collected and handed to
:class:`Inference` from the parser's callbacks, and its response is one write. Anything else (other paths, a
request that arrives while another is unanswered on the connection) goes uvicorn's way, to the ASGI app.
"""

from __future__ import annotations

from asyncio import TimerHandle
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from httptools import HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.api import job_door
from services.gateway.api.compression import Response
from services.gateway.api.inference import PREFIX, SUFFIX, Inference
from services.gateway.api.limits import Body, Headers, Limits
from services.gateway.api.upload import Upload
from tidegate.errors import TidegateError
from tidegate.protocol.envelope import Buffer

_PREFIX, _SUFFIX, _JOBS = PREFIX.encode(), SUFFIX.encode(), job_door.PATH.encode()
# How long an upload may stand still, an answer may wait for its reader, and a refused upload is read on.
STALL_S = 30.0
UNREAD_S = 60.0
LINGER_S = 2.0
SCATTER = 64 * 1024

_STATUS = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


class DirectCall:
    """One call on a connection; to uvicorn it looks like its own request cycle.

    A body that comes in one small piece, as most do, is ``small``; any other is collected in ``body``.
    """

    __slots__ = (
        "_gone",
        "_limits",
        "body",
        "disconnected",
        "expected",
        "headers",
        "id",
        "keep_alive",
        "message_event",
        "response_complete",
        "small",
        "target",
    )

    def __init__(
        self,
        target: str,
        headers: Headers,
        keep_alive: bool,
        gone: Callable[[DirectCall], None],
        limits: Limits,
    ) -> None:
        self.target = target
        self.headers = headers
        self.keep_alive = keep_alive
        self.small = b""
        self.body: Body | None = None
        # The parser has seen that it is a number; 0: not known before.
        self.expected = int(headers.get(b"content-length", 0))
        self.disconnected = False
        self.response_complete = False
        self.id: bytes | None = None
        self.message_event = self  # uvicorn calls message_event.set() when the connection is lost
        self._gone = gone
        self._limits = limits

    def collected(self) -> Body:
        """The body from now on, as one that is not small."""
        if self.body is None:
            self.body = Body(self._limits, self.small)
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


class DirectProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 protocol with a short way for inference calls."""

    def __init__(self, inference: Inference, **given: Any) -> None:
        super().__init__(**given)
        self._inference = inference
        self._direct: DirectCall | None = None
        self._deaf = False
        self._stall: TimerHandle | None = None
        self._unsent = 0
        self._unread: TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._deaf:
            return
        super().data_received(data)
        call = self._direct
        if call is not None and call.expected > SCATTER and not call.response_complete:
            self._receive_in_place(call)

    def _receive_in_place(self, call: DirectCall) -> None:
        """The rest of a large body comes without the parser, which begins anew behind it."""

        def done(refusal: TidegateError | None) -> None:
            if refusal is None:
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
                self.on_message_complete()
            else:
                self._deaf = True  # what still comes is the rest of the body
                self._refuse(call, refusal)

        body = call.collected()
        if call.expected - len(body) <= SCATTER:
            return  # next to nothing is missing
        refusal = body.expect(call.expected)
        if refusal is not None:
            done(refusal)
            return
        self._watch(call, body)
        Upload(self, self.transport, body, done).start()

    def on_headers_complete(self) -> None:
        """The head is there: choose the way."""
        target = self._direct_target()
        if target is None:
            self._direct = None
            super().on_headers_complete()
            return
        limits, headers = self._inference.limits, dict(self.headers)
        call = DirectCall(target, headers, self.parser.should_keep_alive(), self._on_gone, limits)
        self._direct = call
        self.cycle = call  # type: ignore[assignment]
        tight = limits.bodies.used > limits.bodies.limit or limits.answers.used > limits.answers.limit
        # Small bodies are in hand as soon as their head; all else is let in, or refused, before it comes.
        early = tight or call.expected > SCATTER or not call.expected
        if early and (refusal := self._inference.at_head(headers)) is not None:
            self._refuse(call, refusal)
        elif self.expect_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _direct_target(self) -> str | None:
        job = self.url == _JOBS
        infers = self.url.endswith(_SUFFIX) and self.url.startswith(_PREFIX) and b"%" not in self.url
        if not job and not infers:
            return None
        free = self.cycle is None or self.cycle.response_complete
        if not free or self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return None
        return job_door.TARGET if job else self.url[len(_PREFIX) : -len(_SUFFIX)].decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """A part of the body; one over the limit is refused at once and the connection closed."""
        call = self._direct
        if call is None:
            super().on_body(body)
            return
        if call.response_complete:
            return
        if not call.small and call.body is None and len(body) <= SCATTER:
            call.small = body
            self._inference.limits.bodies.used += len(body)
            return
        collected = call.collected()
        refusal = collected.add(body)
        if refusal is not None:
            self._refuse(call, refusal)
        elif len(collected) > SCATTER:
            self._watch(call, collected)

    def on_message_complete(self) -> None:
        """The request is whole: begin."""
        call = self._direct
        if call is None:
            super().on_message_complete()
            return
        self._direct = None
        if call.response_complete:
            self.transport.close()  # it was refused, and all of it has come
            return
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        call.id = self._inference.begin(
            call.target,
            call.headers,
            call.small if call.body is None else call.body.whole(),
            lambda response: self._write(call, response),
        )

    def _write(self, call: DirectCall, response: Response) -> None:
        call.response_complete = True
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
        self.on_response_complete()

    def _write_tail(self, head: bytes, tail: Sequence[Buffer]) -> None:
        if sum(map(len, tail)) < SCATTER:
            self.transport.write(b"".join((head, *tail)))
        else:
            self.transport.writelines([head, *tail])

    def _hold(self, size: int) -> None:
        """An answer waits in the socket's buffer: it counts until its reader has taken nearly all of it."""
        self._unsent += size
        self._inference.limits.answers.force(size)
        if self._unread is None:
            self._unread = self.loop.call_later(UNREAD_S, self._on_unread, self._left())

    def _left(self) -> int:
        return self.transport.get_write_buffer_size()

    def _on_unread(self, seen: int) -> None:
        """A reader that took nothing in all the time has gone; a slow one may go on."""
        if self._left() >= seen:
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(UNREAD_S, self._on_unread, self._left())

    def _let_go(self) -> None:
        self._inference.limits.answers.give(self._unsent)
        self._unsent = 0
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def resume_writing(self) -> None:
        """The socket's buffer is nearly empty."""
        super().resume_writing()
        self._let_go()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, and what it held."""
        if self._stall is not None:
            self._stall.cancel()
        self._let_go()
        super().connection_lost(exc)

    def _refuse(self, call: DirectCall, refusal: TidegateError) -> None:
        """Answer an upload before its end, and read on for a while without keeping anything.

        Closing at once would reset the connection, and the client, still sending, would not see the answer.
        One that waits for a 100 sends nothing more.
        """
        call.keep_alive = False
        self._write(call, self._inference.refuse(call.target, call.headers, refusal))
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(0 if self.expect_100_continue else LINGER_S, self.transport.close)

    def _watch(self, call: DirectCall, body: Body) -> None:
        """See to it that a large upload does not stand still."""
        if self._stall is None:
            self._stall = self.loop.call_later(STALL_S, self._on_stall, call, body, len(body))

    def _on_stall(self, call: DirectCall, body: Body, seen: int) -> None:
        self._stall = None
        if call is not self._direct or call.response_complete:
            return
        if len(body) == seen:
            self.transport.abort()
        else:
            self._watch(call, body)

    def _on_gone(self, call: DirectCall) -> None:
        if call.id is not None:
            self._inference.abandon(call.id, call.target)
