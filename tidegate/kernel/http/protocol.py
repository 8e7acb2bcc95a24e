"""The HTTP/1.1 protocol of all services: uvicorn's, with limits for each connection.

Uvicorn's parser class has no limits, so this class counts bytes and fields. Most requests arrive in one piece
and cost only a few comparisons. One sweep over all connections checks timeouts (``connections.py``).
"""

from __future__ import annotations

import asyncio
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from tidegate.kernel import telemetry
from tidegate.kernel.http import heads
from tidegate.kernel.http.answers import Refusal
from tidegate.kernel.http.connections import Connections
from tidegate.kernel.http.lifetime import BETWEEN, IN_BODY, IN_HEAD, Lifetime, Refused, Trailers

log = telemetry.logger(__name__)

# The most requests that may wait on one connection until the first is answered.
PIPELINED = 64
# The chunk headers and extensions of one body may have at most head_bytes + FRAMING_SHARE * (bytes of data)
# bytes.
FRAMING_SHARE = 8


class Protocol(Lifetime):
    """An HTTP/1.1 connection."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(connections, **given)
        self._max_head, self._max_fields = connections.limits.head_bytes, connections.limits.head_fields
        self._read = 0  # the number of bytes in the last read
        self._upgrading = False
        # Counters of a body that arrives in several reads. _counted: the request with this body.
        # _body_before: body_received() after the first read. _body_last: body_received() after the last read.
        # _raw: bytes read since the first read. _bare: bytes read since the last read that contained a part
        # of the body.
        self._counted: Any = None
        self._body_before = self._body_last = self._raw = self._bare = 0

    # Callbacks of the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count a new connection, or refuse it if there are too many."""
        super().connection_made(transport)
        if not self._connections.add(self, self.client[0] if self.client else ""):
            self.answer(Refusal(503, "overloaded", "This server has too many connections; try again later."))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove a connection that has ended."""
        self._connections.discard(self)
        self.release_head()
        self._deaf = True
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Handle bytes from the client."""
        if self._deaf:
            return
        self._read = len(data)
        at, cycle = self._at, self.cycle
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as found:
            self._ignore_upgrade(memoryview(data), found.args[0])
        except HttpParserError as error:
            self._not_http(error)
        if self._at and not self._deaf:
            self._unfinished(at != IN_BODY and cycle is self.cycle)

    def pause_writing(self) -> None:
        """Record that the caller does not read fast enough."""
        self._pauses += 1
        super().pause_writing()

    def _ignore_upgrade(self, data: memoryview, at: int) -> None:
        """Handle a request for another protocol as a normal one, as RFC 9110 (7.8) allows.

        The parser stops at such a request and skips the body. So a new parser reads the same head without the
        Upgrade field, and then the body.
        """
        try:
            while True:
                self._upgrading = False
                head = heads.without_upgrade(
                    self.parser.get_method(), self.url, self.parser.get_http_version(), self.headers
                )
                self.new_parser()
                self.parser.feed_data(head)
                data = data[at:]
                try:
                    self.parser.feed_data(data)
                    return
                except HttpParserUpgrade as found:
                    at = found.args[0]
        except HttpParserError as error:
            self._not_http(error)

    def new_parser(self) -> None:
        """Parse the next bytes as the start of a request."""
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # uvicorn does the same

    # Callbacks of the parser.

    def on_message_begin(self) -> None:
        """Prepare for a head. The ASGI scope is made later."""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._at = IN_HEAD

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header field. Cut trailing white space, which is not part of the value (RFC 9110, 5.5)."""
        name, value = name.lower(), value.rstrip(b" \t")
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Start the ASGI app for a request.

        If the head has an Upgrade field, do not start the app yet, because the head is parsed again. Raises
        Refused if the head is refused, or if too many requests wait on this connection.
        """
        self.check_head()
        if self.check_unusual():
            return
        self.scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,  # type: ignore[typeddict-item]
            "root_path": self.root_path,
            "headers": self.headers,
            "state": self.app_state.copy(),
        }
        if self._connections.retiring:
            # uvicorn then adds this field to the response, and closes the connection after it.
            self.headers.append((b"connection", b"close"))
        self._previous = self.cycle
        super().on_headers_complete()
        self._at = IN_BODY
        self.keep_no_trailers()
        if len(self.pipeline) > PIPELINED:
            raise Refused(Refusal(429, "too_many_requests", "Too many requests wait on this connection."))

    def check_head(self) -> None:
        """Raise Refused if a head exceeds a limit."""
        if self._read <= self._max_head and not self.held_head and len(self.headers) <= self._max_fields:
            return
        self.release_head()
        size = heads.size(self.parser.get_method(), self.url, self.headers)
        if size > self._max_head or len(self.headers) > self._max_fields:
            raise Refused(heads.too_large(self._max_head, self._max_fields))

    def check_unusual(self) -> bool:
        """Return True if a head has an Upgrade field. Such a head must be parsed again without this field.

        Raises Refused for a wrong Host or Authorization field (see ``heads.problem``), and for the method
        CONNECT.
        """
        if (refusal := heads.problem(self.headers, self.parser.get_http_version())) is not None:
            raise Refused(refusal)
        if not self.parser.should_upgrade():
            return False
        if self.parser.get_method() == b"CONNECT":
            raise Refused(Refusal(501, "not_implemented", "The method CONNECT is not served here."))
        self._upgrading = True
        return True

    def keep_no_trailers(self) -> None:
        """Count and drop all fields that arrive after the head."""
        size = heads.size(b"", self.url, self.headers)
        self.headers = Trailers(self.headers, size, self._max_head, self._max_fields)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        """Pass a part of the body to the ASGI app."""
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Record the end of a request."""
        if self._upgrading:
            return
        self._at = BETWEEN
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Drop the unread body of the answered request, and continue with the next request."""
        if isinstance(self.cycle, RequestResponseCycle) and self.cycle.response_complete:
            self.cycle.body.clear()
        self.answered()

    def answered(self) -> None:
        """Continue with the next request. The sweep checks idle connections, so no timer is set."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._rejected is not None:
            self.answer(self._rejected)

    # Methods for requests that arrive in several reads.

    def _unfinished(self, all_head: bool) -> None:
        """Count a read that ended within a request.

        ``all_head``: True if all bytes of the read belong to one head.
        """
        if self._at == IN_HEAD:
            self._unfinished_head(all_head)
        elif self.cycle is not self._counted:
            self._counted = self.cycle
            self._body_before = self._body_last = self.body_received()
            self._raw = self._bare = 0
        else:
            self._unfinished_body()

    def _unfinished_head(self, all_head: bool) -> None:
        # The read may also contain the end of another request. In that case count only the parsed bytes,
        # because only these surely belong to this head.
        size = self._read if all_head else 1 + heads.size(b"", self.url, self.headers)
        if self.held_head + size > self._max_head or len(self.headers) > self._max_fields:
            self.reject(heads.too_large(self._max_head, self._max_fields))
            return
        self.held_head += size
        self._pending += self._read
        self._connections.hold_head(self, self._read)

    def _unfinished_body(self) -> None:
        """Limit the bytes of a chunked body that are not data: chunk headers, extensions, trailers."""
        received = self.body_received()
        body = received - self._body_before
        self._raw += self._read
        self._bare = self._bare + self._read if received == self._body_last else 0
        self._body_last = received
        if self._bare > self._max_head or self._raw - body > self._max_head + FRAMING_SHARE * body:
            self.reject(heads.too_large(self._max_head, self._max_fields))

    def _not_http(self, error: HttpParserError) -> None:
        if self._deaf:
            return
        cause = error.__context__
        if isinstance(cause, Refused):
            self.reject(cause.refusal)
            return
        if cause is not None and not isinstance(cause, (HttpParserError, ValueError)):
            log.error("unexpected error while a request was read", exc_info=cause)
        self.reject(Refusal(400, "bad_request", f"The request is not valid HTTP/1.1: {error}."))
