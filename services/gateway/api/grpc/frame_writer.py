"""Write the responses of a connection, as far as flow control and the socket allow."""

from __future__ import annotations

import asyncio
import struct

from services.gateway.api.grpc import frames
from services.gateway.api.grpc.frames import ErrorCode, ProtocolError, frame_head, header_block
from services.gateway.api.grpc.message_reader import ENCODINGS
from services.gateway.api.grpc.server_call import ServerCall
from tidegate.kernel.protocol.envelope import Buffer

# The largest DATA frame to send, even if the client accepts larger ones.
FRAME_BYTES = 256 * 1024
HEADERS = b"\x88" + header_block(  # 0x88 is the field ":status: 200" of the static table
    (("content-type", "application/grpc"), ("grpc-accept-encoding", ENCODINGS))
)


class FrameWriter:
    """A writer of frames to one client, within the client's flow-control windows."""

    def __init__(self, transport: asyncio.Transport, calls: dict[int, ServerCall]) -> None:
        """``calls``: the open calls of the connection. The connection removes a call after its last byte."""
        self._transport = transport
        self._calls = calls
        self._window = frames.DEFAULT_WINDOW
        self._frame_size = frames.DEFAULT_FRAME
        self.first_window = frames.DEFAULT_WINDOW
        self.paused = False
        self.sent = 0

    def send(self, call: ServerCall) -> bool:
        """Send as many bytes of a call as possible. Return True if the call is complete."""
        out: list[Buffer] = []
        if call.unsent and not call.headers_sent:
            call.headers_sent = True
            out += (frame_head(len(HEADERS), frames.HEADERS, frames.END_HEADERS, call.id), HEADERS)
        size = call.unsent_bytes
        if len(call.unsent) == 1 and size <= self._allowed(call):  # most responses fit into one frame
            out += (frame_head(size, frames.DATA, 0, call.id), call.unsent.popleft())
            self._count(call, size)
        elif call.unsent:
            self._transport.write(b"".join(out))
            self._send_pieces(call)
            out = []
        over = call.final_trailers is not None and not call.unsent
        if over:
            out += self._end(call)
        if out:
            self._transport.write(b"".join(out))
        return over

    def send_all(self) -> list[ServerCall]:
        """Send as many bytes of all calls as possible. Return the calls that are complete."""
        return [
            call
            for call in list(self._calls.values())
            if (call.unsent or call.final_trailers is not None) and self.send(call)
        ]

    def on_window(self, stream: int, payload: bytes) -> None:
        """Handle a WINDOW_UPDATE frame."""
        if len(payload) != 4:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "the WINDOW_UPDATE frame does not have 4 bytes")
        more = struct.unpack(">I", payload)[0] & frames.WINDOW_MAX
        window = 0
        if stream == 0:
            window = self._window = self._window + more
        elif (call := self._calls.get(stream)) is not None:
            window = call.send_window = call.send_window + more
        if window > frames.WINDOW_MAX:
            raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "the window has more than 2^31-1 bytes")

    def on_settings(self, payload: bytes) -> None:
        """Apply the client's settings and acknowledge them."""
        if len(payload) % 6:
            raise ProtocolError(
                ErrorCode.FRAME_SIZE_ERROR, "the size of the SETTINGS frame is not a multiple of 6 bytes"
            )
        for name, value in struct.iter_unpack(">HI", payload):
            if name == frames.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME <= value < 2**24:
                    raise ProtocolError(
                        ErrorCode.PROTOCOL_ERROR, f"a MAX_FRAME_SIZE of {value} bytes is not allowed"
                    )
                self._frame_size = min(value, FRAME_BYTES)
            elif name == frames.INITIAL_WINDOW_SIZE:
                if value > frames.WINDOW_MAX:
                    raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "the window has more than 2^31-1 bytes")
                for call in self._calls.values():
                    call.send_window += value - self.first_window
                self.first_window = value
        self._transport.write(frame_head(0, frames.SETTINGS, frames.ACK, 0))

    def _allowed(self, call: ServerCall) -> int:
        return 0 if self.paused else min(self._window, call.send_window, self._frame_size)

    def _send_pieces(self, call: ServerCall) -> None:
        while call.unsent and (allowed := self._allowed(call)) > 0:
            piece = call.unsent.popleft()
            if len(piece) > allowed:
                view = memoryview(piece)
                call.unsent.appendleft(view[allowed:])
                piece = view[:allowed]
            self._transport.writelines((frame_head(len(piece), frames.DATA, 0, call.id), piece))
            self._count(call, len(piece))

    def _count(self, call: ServerCall, size: int) -> None:
        self._window -= size
        call.send_window -= size
        self.sent += size
        call.sent(size)

    def _end(self, call: ServerCall) -> tuple[bytes, ...]:
        assert call.final_trailers is not None
        block = header_block(call.final_trailers)
        if not call.headers_sent:
            block = HEADERS + block
        flags = frames.END_HEADERS | frames.END_STREAM
        end = (frame_head(len(block), frames.HEADERS, flags, call.id), block)
        # If the client has not finished sending, a reset makes it stop.
        return end if call.half_closed else (*end, frames.reset(call.id, ErrorCode.NO_ERROR))
