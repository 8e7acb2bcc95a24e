"""The server's side of one HTTP/2 connection: frames, calls, and what a client may cost.

Follows RFC 9113 and gRPC's "gRPC over HTTP2". A call is admitted or refused by its headers, so the server
keeps nothing that an unknown client sends. Bytes of known clients count against the budget as they come
(``message_reader.py``).
"""

from __future__ import annotations

import asyncio
from typing import cast

from grpc import StatusCode

from services.gateway.api.grpc import frames
from services.gateway.api.grpc.call_headers import BLOCK_BYTES, CallHeaders, HeaderBlockReader
from services.gateway.api.grpc.frame_writer import HEADERS, FrameWriter
from services.gateway.api.grpc.frames import ErrorCode, ProtocolError, frame_head, header_block
from services.gateway.api.grpc.server_call import ServerCall
from services.gateway.api.grpc.server_state import ServerState
from services.gateway.api.grpc.status import Metadata, code_of, details_of, percent, trailers_of
from services.gateway.domain.http2_flood import FloodGuard
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.service.app import new_request_id

# Calls of one connection.
STREAMS = 1024
# How long what a client sends is still read, and dropped, after it was told that its connection ends.
LINGER_S = 1.0
# What may wait for a client that does not read before it must not ask for more. Answers alone are less than
# that: none is written while the socket's buffer is full.
UNREAD_BYTES = 512 * 1024
# How much a client may send ahead on one stream, and on the connection.
STREAM_WINDOW = 4 * 2**20
CONNECTION_WINDOW = 16 * 2**20


class GrpcConnection(asyncio.Protocol):
    """One client."""

    def __init__(self, shared: ServerState, all_of_them: set[GrpcConnection]) -> None:
        """``all_of_them``: where the connection is while it is open."""
        self._shared = shared
        self._all = all_of_them
        self._transport: asyncio.Transport
        self._out: FrameWriter
        self._loop = asyncio.get_running_loop()
        self._heads = HeaderBlockReader(shared.heads)
        self._patience = FloodGuard(self._loop.time())
        self._greeted = False
        self._buffer = b""
        self._block: bytearray | None = None
        self._block_of = (0, 0)
        self._last = 0
        self._credit = CONNECTION_WINDOW
        self.calls: dict[int, ServerCall] = {}
        self.active = self._loop.time()
        self.known = False
        self.working = 0
        self.draining = False
        self.closing = False

    @property
    def halfway(self) -> bool:
        """Return True if the client has stopped in the middle of a frame, a header block or its greeting."""
        return bool(self._buffer) or self._block is not None or not self._greeted

    @property
    def paused(self) -> bool:
        """Return True if the client does not read."""
        return self._out.paused

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client, if there is room for it."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        self._out = FrameWriter(self._transport, self.calls)
        if not self._shared.enter(self):
            self.abort()
            return
        self._all.add(self)
        ours = (
            (frames.HEADER_TABLE_SIZE, 0),
            (frames.MAX_CONCURRENT_STREAMS, STREAMS),
            (frames.INITIAL_WINDOW_SIZE, STREAM_WINDOW),
            (frames.MAX_HEADER_LIST_SIZE, BLOCK_BYTES),
        )
        more = frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)
        self._transport.write(frames.settings(ours) + more)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all that is under way."""
        self.closing = True
        self._cancel_all()
        self._shared.leave(self)
        self._all.discard(self)

    def pause_writing(self) -> None:
        """The socket's buffer is full."""
        self._out.paused = True

    def resume_writing(self) -> None:
        """The socket's buffer has room."""
        self._out.paused = False
        self._send_all()

    def data_received(self, data: bytes) -> None:
        """Take frames, and parts of frames."""
        if self.closing:
            return
        self.active = self._loop.time()
        buffer = self._buffer + data if self._buffer else data
        try:
            self._buffer = buffer[self._read(buffer) :]
        except ProtocolError as error:
            self.end(error.code, str(error))

    # What the server calls.

    def drain(self) -> None:
        """Take no more calls; the connection closes with its last one."""
        if not self.closing and not self.draining:
            self.draining = True
            self._transport.write(frames.goaway(self._last, ErrorCode.NO_ERROR, "the server is stopping"))
            self._close_when_drained()

    def end(self, code: ErrorCode, why: str) -> None:
        """Say why the connection ends, and end it."""
        if self.closing:
            return
        self.closing = True
        self._transport.write(frames.goaway(self._last, code, why))
        self._cancel_all()
        if self._transport.can_write_eof():
            # Closed while bytes of the client are unread it would be reset, and the reason would be lost.
            self._transport.write_eof()
            self._loop.call_later(LINGER_S, self._transport.abort)
        else:
            self._transport.close()

    def abort(self) -> None:
        """End the connection without a word."""
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

    # What a call needs.

    def send(self, call: ServerCall) -> None:
        """Send as much of ``call.unsent`` as the windows let through, and the end if there is one."""
        if self.closing or call.finished:
            return
        before = self._out.sent
        over = self._out.send(call)
        self._patience.sent(self._out.sent - before)
        if over:
            self._over(call)

    def replenish(self, call: ServerCall) -> None:
        """Let the client send more of a call whose messages are taken."""
        if call.credit <= STREAM_WINDOW // 2 and not call.half_closed and not self.closing:
            if call.incoming.messages:
                return
            self._transport.write(frames.window_update(call.id, STREAM_WINDOW - call.credit))
            call.credit = STREAM_WINDOW

    def _send_all(self) -> None:
        if not self.closing:
            before = self._out.sent
            for call in self._out.send_all():
                self._over(call)
            if self._out.sent > before:
                self._patience.sent(self._out.sent - before)

    def _over(self, call: ServerCall) -> None:
        self._patience.answered()
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
        if self.draining and not self.calls and not self.closing:
            self.closing = True
            self._transport.close()

    # Frames.

    def _read(self, buffer: bytes) -> int:
        """Handle the whole frames of the buffer; return where the rest begins. Raises Broken."""
        at, end = 0, len(buffer)
        if not self._greeted:
            if not frames.PREFACE.startswith(buffer[:24]):
                raise ProtocolError(
                    ErrorCode.PROTOCOL_ERROR, "this port speaks gRPC: HTTP/2 with prior knowledge"
                )
            if end < 24:
                return 0
            self._greeted, at = True, 24
        while end - at >= 9 and not self.closing:
            high, low, kind, flags, stream = frames.HEAD.unpack_from(buffer, at)
            size = high << 8 | low
            if size > frames.DEFAULT_FRAME:
                raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
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
            self._nuisance()
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
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a client pushed")

    def _nuisance(self) -> None:
        self._must(self._patience.nuisance(self._loop.time()))
        if self._out.paused and self._transport.get_write_buffer_size() > UNREAD_BYTES:
            raise ProtocolError(
                ErrorCode.ENHANCE_YOUR_CALM, "the client sends requests and does not read the answers"
            )

    @staticmethod
    def _must(problem: str | None) -> None:
        if problem is not None:
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, problem)

    def _on_data(self, stream: int, payload: bytes, flags: int) -> None:
        size, ended = len(payload), flags & frames.END_STREAM
        self._credit -= size
        if self._credit < 0:
            raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window allows")
        if self._credit <= CONNECTION_WINDOW // 2:
            self._transport.write(frames.window_update(0, CONNECTION_WINDOW - self._credit))
            self._credit = CONNECTION_WINDOW
        data = frames.unpadded(payload, flags)
        if not data and not ended:
            self._nuisance()
        call = self.calls.get(stream)
        if call is None:
            if stream > self._last or not stream & 1:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"data for stream {stream}, which is not open")
            self._must(self._patience.stray(size))
            return
        call.credit -= size
        if call.half_closed:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, "data after the end of a stream")
        if call.credit < 0:
            self.reset(call, ErrorCode.FLOW_CONTROL_ERROR)
            return
        if data and not call.received(data):
            self._must(self._patience.stray(size))
        if ended:
            call.ended()
        elif not call.finished:
            self.replenish(call)

    def _on_ping(self, payload: bytes, flags: int) -> None:
        if len(payload) != 8:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a PING that is not 8 bytes")
        if not flags & frames.ACK:
            self._must(self._patience.ping(self._loop.time()))
            self._transport.write(frame_head(8, frames.PING, frames.ACK, 0) + payload)

    def _on_reset(self, stream: int) -> None:
        call = self.calls.get(stream)
        if call is not None:
            self._forget(call)
            call.cancel()
            self._must(self._patience.reset())
            self._close_when_drained()

    # Heads.

    def _on_headers(self, stream: int, payload: bytes, flags: int) -> None:
        block = frames.unpadded(payload, flags)
        if flags & frames.HAS_PRIORITY:
            block = block[5:]
        if not stream & 1:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"a client may open only odd streams, not {stream}")
        if flags & frames.END_HEADERS:
            self._on_head(stream, block, bool(flags & frames.END_STREAM))
        else:
            self._block, self._block_of = bytearray(block), (stream, flags & frames.END_STREAM)

    def _on_continuation(self, stream: int, payload: bytes, flags: int) -> None:
        if self._block is None or self._block_of[0] != stream:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a CONTINUATION frame without a header block")
        self._block += payload
        if len(self._block) > BLOCK_BYTES:
            raise ProtocolError(
                ErrorCode.ENHANCE_YOUR_CALM, f"a header block of more than {BLOCK_BYTES} bytes"
            )
        if flags & frames.END_HEADERS:
            block, self._block = bytes(self._block), None
            self._on_head(stream, block, bool(self._block_of[1]))

    def _on_head(self, stream: int, block: bytes, ended: bool) -> None:
        head = self._heads.read(block)
        if stream <= self._last:  # trailers, of which nothing is used, or for a call that has ended
            self._nuisance()
            call = self.calls.get(stream)
            if call is not None and (call.half_closed or not ended):
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a second head on one stream")
            if call is not None:
                call.ended()
            return
        self._last = stream
        self._patience.begun(STREAM_WINDOW)
        if self.draining or len(self.calls) >= STREAMS:
            self._nuisance()
            self._transport.write(frames.reset(stream, ErrorCode.REFUSED_STREAM))
        elif head.problem:
            self._nuisance()
            self._write_head(stream, header_block(((":status", str(head.problem)),)), ended)
        else:
            self._begin(stream, head, ended)

    def _begin(self, stream: int, head: CallHeaders, ended: bool) -> None:
        shared = self._shared
        method = shared.methods.get(head.path)
        if method is None:
            words = f"there is no method {head.path[:128]!r}"
            self._refuse(stream, StatusCode.UNIMPLEMENTED, words, (), ended)
            return
        call = ServerCall(self, stream, head, method, shared.limits, self._out.first_window)
        call.credit = STREAM_WINDOW
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
        """Answer a call that does not begin. What its client still sends is dropped."""
        self._nuisance()
        fields = [("grpc-status", str(code.value[0])), ("grpc-message", percent(details)), *trailers]
        self._write_head(stream, HEADERS + header_block(fields), ended)

    def _write_head(self, stream: int, block: bytes, ended: bool) -> None:
        flags = frames.END_HEADERS | frames.END_STREAM
        out = frame_head(len(block), frames.HEADERS, flags, stream) + block
        self._transport.write(out if ended else out + frames.reset(stream, ErrorCode.NO_ERROR))
