"""What a connection sends: answers, as far as the client's windows and its socket let them through."""

from __future__ import annotations

import asyncio
import struct

from services.gateway.api.grpc import frames
from services.gateway.api.grpc.frames import ErrorCode, ProtocolError, frame_head, header_block
from services.gateway.api.grpc.message_reader import ENCODINGS
from services.gateway.api.grpc.server_call import ServerCall
from tidegate.kernel.protocol.envelope import Buffer

# Largest DATA frame that is sent, whatever the client would take.
FRAME_BYTES = 256 * 1024
HEADERS = b"\x88" + header_block(  # 0x88: ":status: 200" of the static table
    (("content-type", "application/grpc"), ("grpc-accept-encoding", ENCODINGS))
)


class FrameWriter:
    """The windows of one client, and what they let through."""

    def __init__(self, transport: asyncio.Transport, calls: dict[int, ServerCall]) -> None:
        """``calls``: those of the connection; a call leaves them when its last byte has been written."""
        self._transport = transport
        self._calls = calls
        self._window = frames.DEFAULT_WINDOW
        self._frame_size = frames.DEFAULT_FRAME
        self.first_window = frames.DEFAULT_WINDOW
        self.paused = False
        self.sent = 0

    def send(self, call: ServerCall) -> bool:
        """Send what can be sent; return whether that was the last of the call."""
        out: list[Buffer] = []
        if call.unsent and not call.headed:
            call.headed = True
            out += (frame_head(len(HEADERS), frames.HEADERS, frames.END_HEADERS, call.id), HEADERS)
        size = call.unsent_bytes
        if len(call.unsent) == 1 and size <= self._room(call):  # nearly always
            out += (frame_head(size, frames.DATA, 0, call.id), call.unsent.popleft())
            self._count(call, size)
        elif call.unsent:
            self._transport.write(b"".join(out))
            self._send_pieces(call)
            out = []
        over = call.ending is not None and not call.unsent
        if over:
            out += self._end(call)
        if out:
            self._transport.write(b"".join(out))
        return over

    def send_all(self) -> list[ServerCall]:
        """Send what can be sent of all calls; return those that are over."""
        return [
            call
            for call in list(self._calls.values())
            if (call.unsent or call.ending is not None) and self.send(call)
        ]

    def on_window(self, stream: int, payload: bytes) -> None:
        """The client takes more."""
        if len(payload) != 4:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a WINDOW_UPDATE that is not 4 bytes")
        more = struct.unpack(">I", payload)[0] & frames.WINDOW_MAX
        window = 0
        if stream == 0:
            window = self._window = self._window + more
        elif (call := self._calls.get(stream)) is not None:
            window = call.window = call.window + more
        if window > frames.WINDOW_MAX:
            raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "a window of more than 2^31-1")

    def on_settings(self, payload: bytes) -> None:
        """The client's settings, which are acknowledged."""
        if len(payload) % 6:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS that are not multiples of 6 bytes")
        for name, value in struct.iter_unpack(">HI", payload):
            if name == frames.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME <= value < 2**24:
                    raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"a largest frame of {value} bytes")
                self._frame_size = min(value, FRAME_BYTES)
            elif name == frames.INITIAL_WINDOW_SIZE:
                if value > frames.WINDOW_MAX:
                    raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "a window of more than 2^31-1")
                for call in self._calls.values():
                    call.window += value - self.first_window
                self.first_window = value
        self._transport.write(frame_head(0, frames.SETTINGS, frames.ACK, 0))

    def _room(self, call: ServerCall) -> int:
        return 0 if self.paused else min(self._window, call.window, self._frame_size)

    def _send_pieces(self, call: ServerCall) -> None:
        while call.unsent and (room := self._room(call)) > 0:
            piece = call.unsent.popleft()
            if len(piece) > room:
                view = memoryview(piece)
                call.unsent.appendleft(view[room:])
                piece = view[:room]
            self._transport.writelines((frame_head(len(piece), frames.DATA, 0, call.id), piece))
            self._count(call, len(piece))

    def _count(self, call: ServerCall, size: int) -> None:
        self._window -= size
        call.window -= size
        self.sent += size
        call.sent(size)

    def _end(self, call: ServerCall) -> tuple[bytes, ...]:
        assert call.ending is not None
        block = header_block(call.ending)
        if not call.headed:
            block = HEADERS + block
        flags = frames.END_HEADERS | frames.END_STREAM
        end = (frame_head(len(block), frames.HEADERS, flags, call.id), block)
        # A client that has more to say is told to stop.
        return end if call.half_closed else (*end, frames.reset(call.id, ErrorCode.NO_ERROR))
