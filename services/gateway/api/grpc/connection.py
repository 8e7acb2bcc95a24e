"""The server's side of one HTTP/2 connection: frames, calls, and limits for the client.

The connection follows RFC 9113 and gRPC's "gRPC over HTTP2". A call is admitted or refused when its headers
arrive, so the server stores no messages of a refused call. The memory budget counts the bytes of admitted
calls as they arrive (``message_reader.py``).
"""

from __future__ import annotations

import asyncio
from typing import cast

from grpc import StatusCode

from services.gateway.api.grpc import frames
from services.gateway.api.grpc.call_headers import BLOCK_BYTES, CallHeaders, HeaderBlockReader
from services.gateway.api.grpc.frame_writer import HEADERS, FrameWriter
from services.gateway.api.grpc.frames import ErrorCode, ProtocolError, frame_head, header_block
from services.gateway.api.grpc.server_call import Address, ServerCall
from services.gateway.api.grpc.server_state import ServerState
from services.gateway.api.grpc.status import Metadata, code_of, details_of, percent, trailers_of
from services.gateway.domain.http2_flood import FloodGuard
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.answers import new_request_id

# The most concurrent calls of one connection.
STREAMS = 1024
# After the server has announced the end of a connection, it reads and drops the client's bytes for this many
# seconds.
LINGER_S = 1.0
# The most bytes in the socket's write buffer. The buffer grows if a client sends frames and does not read the
# answers to them, for example the answers to PING. Above this limit, the connection ends. Responses cannot
# exceed the limit, because none is written while the buffer is full.
UNREAD_BYTES = 512 * 1024
# The flow-control windows: how many bytes a client may send on one stream, and on the connection, before the
# server allows more.
STREAM_WINDOW = 4 * 2**20
CONNECTION_WINDOW = 16 * 2**20


class GrpcConnection(asyncio.Protocol):
    """The connection of one client."""

    def __init__(self, shared: ServerState, open_connections: set[GrpcConnection]) -> None:
        """``open_connections``: the set to which this connection adds itself while it is open."""
        self._shared = shared
        self._open = open_connections
        self._transport: asyncio.Transport
        self._out: FrameWriter
        self._loop = asyncio.get_running_loop()
        self._heads = HeaderBlockReader(shared.headers_cache)
        self._flood = FloodGuard(self._loop.time())
        self._greeted = False
        self._buffer = b""
        self._block: bytearray | None = None
        self._block_of = (0, 0)
        self._last = 0
        self._receive_window = CONNECTION_WINDOW
        self.calls: dict[int, ServerCall] = {}
        self.active = self._loop.time()
        self.known = False
        self.working = 0
        self.draining = False
        self._drained = False
        self.closing = False

    @property
    def halfway(self) -> bool:
        """Return True if a frame, a header block or the preface is incomplete."""
        return bool(self._buffer) or self._block is not None or not self._greeted

    @property
    def paused(self) -> bool:
        """Return True if the socket's buffer is full, because the client does not read."""
        return self._out.paused

    def addresses(self) -> tuple[Address | None, Address | None]:
        """Return host and port of the client and of the server, if they are known."""
        found = (self._transport.get_extra_info(end) for end in ("peername", "sockname"))
        client, server = (tuple(each[:2]) if isinstance(each, tuple) else None for each in found)
        return client, server

    # Callbacks of asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the server's settings. Close the connection if the gateway has too many connections."""
        self._transport = cast(asyncio.Transport, transport)  # cast: uvloop's transport has another class
        self._out = FrameWriter(self._transport, self.calls)
        if not self._shared.enter(self):
            self.abort()
            return
        self._open.add(self)
        ours = (
            (frames.HEADER_TABLE_SIZE, 0),
            (frames.MAX_CONCURRENT_STREAMS, STREAMS),
            (frames.INITIAL_WINDOW_SIZE, STREAM_WINDOW),
            (frames.MAX_HEADER_LIST_SIZE, BLOCK_BYTES),
        )
        more = frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)
        self._transport.write(frames.settings(ours) + more)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all calls in flight."""
        self.closing = True
        self._cancel_all()
        self._shared.leave(self)
        self._open.discard(self)

    def pause_writing(self) -> None:
        """Stop writing, because the socket's buffer is full."""
        self._out.paused = True

    def resume_writing(self) -> None:
        """Write again, because the socket's buffer has room."""
        self._out.paused = False
        self._send_all()

    def data_received(self, data: bytes) -> None:
        """Handle the complete frames. Keep an incomplete frame until its other bytes arrive."""
        if self.closing:
            return
        self.active = self._loop.time()
        buffer = self._buffer + data if self._buffer else data
        try:
            self._buffer = buffer[self._read(buffer) :]
        except ProtocolError as error:
            self.end(error.code, str(error))

    # Methods for the server.

    def drain(self) -> None:
        """Accept no more calls; the connection closes after its last call."""
        if not self.closing and not self.draining:
            self.draining = True
            self._transport.write(frames.goaway(self._last, ErrorCode.NO_ERROR, "the server is stopping"))
            self._close_when_drained()

    def end(self, code: ErrorCode, why: str) -> None:
        """Send the reason in a GOAWAY frame, and end the connection."""
        if self.closing:
            return
        self.closing = True
        self._transport.write(frames.goaway(self._last, code, why))
        self._cancel_all()
        if self._transport.can_write_eof():
            # Closing with unread bytes would reset the connection, so the client would not get the reason.
            self._transport.write_eof()
            self._loop.call_later(LINGER_S, self._transport.abort)
        else:
            self._transport.close()

    def abort(self) -> None:
        """End the connection immediately, without a GOAWAY frame."""
        self.closing = True
        self._cancel_all()
        self._shared.leave(self)
        self._transport.abort()

    def reset(self, call: ServerCall, code: ErrorCode) -> None:
        """End one call without a status."""
        self._forget(call)
        call.cancel()
        if not self.closing:
            self._transport.write(frames.reset(call.id, code))

    # Methods for calls.

    def send(self, call: ServerCall) -> None:
        """Send as much of ``call.unsent`` as flow control allows, and the status at the end of the call."""
        if self.closing or call.finished:
            return
        before = self._out.sent
        over = self._out.send(call)
        self._flood.sent(self._out.sent - before)
        if over:
            self._complete(call)

    def replenish(self, call: ServerCall) -> None:
        """Allow the client to send more bytes for a call.

        Do nothing if the handler has not taken all messages, or if the client may still send more than half
        of STREAM_WINDOW.
        """
        if call.receive_window <= STREAM_WINDOW // 2 and not call.half_closed and not self.closing:
            if call.reader.messages:
                return
            self._transport.write(frames.window_update(call.id, STREAM_WINDOW - call.receive_window))
            call.receive_window = STREAM_WINDOW

    def _send_all(self) -> None:
        if not self.closing:
            before = self._out.sent
            for call in self._out.send_all():
                self._complete(call)
            if self._out.sent > before:
                self._flood.sent(self._out.sent - before)

    def _complete(self, call: ServerCall) -> None:
        self._flood.answered()
        self._forget(call)
        call.close()
        self._close_when_drained()

    def _cancel_all(self) -> None:
        for call in list(self.calls.values()):
            self._forget(call)
            call.cancel()

    def _forget(self, call: ServerCall) -> None:
        if self.calls.pop(call.id, None) is not None:
            self._shared.end(self, call)

    def _close_when_drained(self) -> None:
        """Close the connection after LINGER_S seconds, if it drains and has no calls.

        The client may close it earlier. Until the close, refuse calls that are on the way, so that clients
        retry them. A close with unread bytes would reset the connection, and the client could miss the GOAWAY
        frame.
        """
        if self.draining and not self.calls and not self.closing and not self._drained:
            self._drained = True
            self._loop.call_later(LINGER_S, self._close)

    def _close(self) -> None:
        if not self.closing:
            self.closing = True
            self._transport.close()

    # Frames.

    def _read(self, buffer: bytes) -> int:
        """Handle the complete frames in the buffer, and return the position where the last of them ends.

        Raise ProtocolError if the client broke the protocol or a limit.
        """
        at, end = 0, len(buffer)
        if not self._greeted:
            if not frames.PREFACE.startswith(buffer[:24]):
                raise ProtocolError(
                    ErrorCode.PROTOCOL_ERROR, "this port accepts only gRPC (HTTP/2 with prior knowledge)"
                )
            if end < 24:
                return 0
            self._greeted, at = True, 24
        while end - at >= 9 and not self.closing:
            high, low, kind, flags, stream = frames.HEAD.unpack_from(buffer, at)
            size = high << 8 | low
            if size > frames.DEFAULT_FRAME:
                raise ProtocolError(
                    ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes is larger than the limit"
                )
            if end - at - 9 < size:
                break
            if self._block is not None and kind != frames.CONTINUATION:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "another frame came inside a header block")
            self._on_frame(kind, flags, stream & frames.LAST_STREAM, buffer[at + 9 : at + 9 + size])
            at += 9 + size
        return at

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.DATA:
            self._on_data(stream, payload, flags)
        elif kind == frames.HEADERS:
            self._on_headers(stream, payload, flags)
        else:
            self._count_useless_frame()
            if kind == frames.WINDOW_UPDATE:
                self._out.on_window(stream, payload)
                self._send_all()
            elif kind == frames.CONTINUATION:
                self._on_continuation(stream, payload, flags)
            elif kind == frames.SETTINGS and not flags & frames.ACK:
                self._out.on_settings(payload)
                self._send_all()
            elif kind == frames.PING:
                self._on_ping(payload, flags)
            elif kind == frames.RST_STREAM:
                self._on_reset(stream)
            elif kind == frames.PUSH_PROMISE:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a client may not send PUSH_PROMISE")

    def _count_useless_frame(self) -> None:
        self._end_for(self._flood.useless_frame(self._loop.time()))
        if self._out.paused and self._transport.get_write_buffer_size() > UNREAD_BYTES:
            raise ProtocolError(
                ErrorCode.ENHANCE_YOUR_CALM, "the client sends frames but does not read the answers"
            )

    @staticmethod
    def _end_for(problem: str | None) -> None:
        if problem is not None:
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, problem)

    def _on_data(self, stream: int, payload: bytes, flags: int) -> None:
        size, ended = len(payload), flags & frames.END_STREAM
        self._receive_window -= size
        if self._receive_window < 0:
            raise ProtocolError(
                ErrorCode.FLOW_CONTROL_ERROR,
                "the client sent more bytes than the flow-control window allows",
            )
        if self._receive_window <= CONNECTION_WINDOW // 2:
            self._transport.write(frames.window_update(0, CONNECTION_WINDOW - self._receive_window))
            self._receive_window = CONNECTION_WINDOW
        data = frames.unpadded(payload, flags)
        if not data and not ended:
            self._count_useless_frame()
        call = self.calls.get(stream)
        if call is None:
            if stream > self._last or not stream & 1:
                raise ProtocolError(
                    ErrorCode.PROTOCOL_ERROR, f"the client sent data for stream {stream}, which is not open"
                )
            self._end_for(self._flood.late_data(size))
            return
        call.receive_window -= size
        if call.half_closed:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, "the client sent data after the end of the stream")
        if call.receive_window < 0:
            self.reset(call, ErrorCode.FLOW_CONTROL_ERROR)
            return
        if data and not call.received(data):
            self._end_for(self._flood.late_data(size))
        if ended:
            call.ended()
        elif not call.finished:
            self.replenish(call)

    def _on_ping(self, payload: bytes, flags: int) -> None:
        if len(payload) != 8:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "the PING frame does not have 8 bytes")
        if not flags & frames.ACK:
            self._end_for(self._flood.ping(self._loop.time()))
            self._transport.write(frame_head(8, frames.PING, frames.ACK, 0) + payload)

    def _on_reset(self, stream: int) -> None:
        call = self.calls.get(stream)
        if call is not None:
            self._forget(call)
            call.cancel()
            self._end_for(self._flood.reset())
            self._close_when_drained()

    # Headers.

    def _on_headers(self, stream: int, payload: bytes, flags: int) -> None:
        block = frames.unpadded(payload, flags)
        if flags & frames.HAS_PRIORITY:
            block = block[5:]
        if not stream & 1:
            raise ProtocolError(
                ErrorCode.PROTOCOL_ERROR, f"a client may open only streams with odd numbers, not {stream}"
            )
        if flags & frames.END_HEADERS:
            self._on_head(stream, block, bool(flags & frames.END_STREAM))
        else:
            self._block, self._block_of = bytearray(block), (stream, flags & frames.END_STREAM)

    def _on_continuation(self, stream: int, payload: bytes, flags: int) -> None:
        if self._block is None or self._block_of[0] != stream:
            raise ProtocolError(
                ErrorCode.PROTOCOL_ERROR, "the CONTINUATION frame has no header block before it"
            )
        self._block += payload
        if len(self._block) > BLOCK_BYTES:
            raise ProtocolError(
                ErrorCode.ENHANCE_YOUR_CALM, f"the header block has more than {BLOCK_BYTES} bytes"
            )
        if flags & frames.END_HEADERS:
            block, self._block = bytes(self._block), None
            self._on_head(stream, block, bool(self._block_of[1]))

    def _on_head(self, stream: int, block: bytes, ended: bool) -> None:
        head = self._heads.read(block)
        if stream <= self._last:  # trailers, or headers of an ended call: their fields are ignored
            self._count_useless_frame()
            call = self.calls.get(stream)
            if call is not None and (call.half_closed or not ended):
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "the stream has already had its headers")
            if call is not None:
                call.ended()
            return
        self._last = stream
        self._flood.call_began(STREAM_WINDOW)
        if self.draining or len(self.calls) >= STREAMS:
            self._count_useless_frame()
            self._transport.write(frames.reset(stream, ErrorCode.REFUSED_STREAM))
        elif head.problem:
            self._count_useless_frame()
            self._write_head(stream, header_block(((":status", str(head.problem)),)), ended)
        else:
            self._begin(stream, head, ended)

    def _begin(self, stream: int, head: CallHeaders, ended: bool) -> None:
        shared = self._shared
        method = shared.methods.get(head.path)
        if method is None:
            details = f"the method {head.path[:128]!r} does not exist"
            self._refuse(stream, StatusCode.UNIMPLEMENTED, details, (), ended)
            return
        call = ServerCall(self, stream, head, method, shared.limits, self._out.first_window)
        call.receive_window = STREAM_WINDOW
        try:
            shared.admit(call, head.credential)
        except TidegateError as error:
            rid = head.rid or new_request_id()
            shared.refused(error, rid)
            trailers = trailers_of(error, rid)
            self._refuse(stream, code_of(error), details_of(error), trailers, ended)
            return
        self.calls[stream] = call
        self.known = self.known or not method.open
        shared.begin(self, call)
        if method.streams:
            call.begin()
        if ended:
            call.ended()

    def _refuse(self, stream: int, code: StatusCode, details: str, trailers: Metadata, ended: bool) -> None:
        """Answer a call that is not admitted. Later data of this call is dropped."""
        self._count_useless_frame()
        fields = [("grpc-status", str(code.value[0])), ("grpc-message", percent(details)), *trailers]
        self._write_head(stream, HEADERS + header_block(fields), ended)

    def _write_head(self, stream: int, block: bytes, ended: bool) -> None:
        flags = frames.END_HEADERS | frames.END_STREAM
        out = frame_head(len(block), frames.HEADERS, flags, stream) + block
        self._transport.write(out if ended else out + frames.reset(stream, ErrorCode.NO_ERROR))
