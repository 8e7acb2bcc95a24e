"""The hot path: inference calls answered on the connection itself, below ASGI.

An inference call needs none of what ASGI brings (a task, a scope, messages), and those cost more than the
queue does. So uvicorn's own HTTP protocol is extended: a plain inference call is collected and handed to
:class:`Inference` from the parser's callbacks, and its response is one write. Anything else (other paths, a
request that arrives while another is unanswered on the connection) goes uvicorn's way, to the ASGI app.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.api.inference import PREFIX, SUFFIX, Inference, Response

_PREFIX, _SUFFIX = PREFIX.encode(), SUFFIX.encode()
_STATUS = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


class DirectCall:
    """One call on a connection; to uvicorn it looks like its own request cycle."""

    __slots__ = (
        "_gone",
        "body",
        "disconnected",
        "id",
        "keep_alive",
        "message_event",
        "response_complete",
        "target",
    )

    def __init__(self, target: str, keep_alive: bool, gone: Callable[[DirectCall], None]) -> None:
        self.target = target
        self.keep_alive = keep_alive
        self.body = bytearray()
        self.disconnected = False
        self.response_complete = False
        self.id: bytes | None = None
        self.message_event = self  # uvicorn calls message_event.set() when the connection is lost
        self._gone = gone

    def set(self) -> None:
        """The connection was lost; if the call is under way its caller has gone."""
        if self.disconnected and not self.response_complete:
            self._gone(self)


class DirectProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 protocol with a short way for inference calls."""

    def __init__(self, inference: Inference, **given: Any) -> None:
        super().__init__(**given)
        self._inference = inference
        self._direct: DirectCall | None = None

    def on_headers_complete(self) -> None:
        """The head is there: choose the way."""
        target = self._direct_target()
        if target is None:
            self._direct = None
            super().on_headers_complete()
            return
        call = DirectCall(target, self.parser.should_keep_alive(), self._on_gone)
        self._direct = call
        self.cycle = call  # type: ignore[assignment]

    def _direct_target(self) -> str | None:
        if not (self.url.endswith(_SUFFIX) and self.url.startswith(_PREFIX)) or b"%" in self.url:
            return None
        free = self.cycle is None or self.cycle.response_complete
        if not free or self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return None
        if self.expect_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self.url[len(_PREFIX) : -len(_SUFFIX)].decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """A part of the body; one over the limit is refused at once and the connection closed."""
        call = self._direct
        if call is None:
            super().on_body(body)
            return
        if call.response_complete:
            return
        if len(call.body) + len(body) > self._inference.max_body_bytes:
            call.keep_alive = False
            self._write(call, self._inference.too_large(call.target, dict(self.headers)))
            return
        call.body += body

    def on_message_complete(self) -> None:
        """The request is whole: begin."""
        call = self._direct
        if call is None:
            super().on_message_complete()
            return
        self._direct = None
        if call.response_complete:
            return
        body = bytes(call.body)
        call.body.clear()
        call.id = self._inference.begin(
            call.target, dict(self.headers), body, lambda response: self._write(call, response)
        )

    def _write(self, call: DirectCall, response: Response) -> None:
        call.response_complete = True
        if call.disconnected or self.transport.is_closing():
            return
        parts = [_STATUS[response.status]]
        for name, value in self.server_state.default_headers:
            parts += (name, b": ", value, b"\r\n")
        for name, value in response.headers:
            parts += (name, b": ", value, b"\r\n")
        parts.append(b"\r\n" if call.keep_alive else b"connection: close\r\n\r\n")
        parts.append(response.body)
        self.transport.write(b"".join(parts))
        if not call.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _on_gone(self, call: DirectCall) -> None:
        if call.id is not None:
            self._inference.abandon(call.id, call.target)
