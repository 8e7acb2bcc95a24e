"""Unary gRPC calls over one HTTP/2 connection of the event loop's own, for the one call that is hot.

``grpc.aio`` has an I/O thread of its own and wakes the loop for each completion; next to a light model that
costs more than the model. Here a call is two frames out and three in, on the loop's own transport. It does
what one client of one method on a Unix socket needs: flow control both ways, cancelling, reconnecting.

After RFC 9113 (HTTP/2) and gRPC's "gRPC over HTTP2". Header blocks are written once; those that come are
read by the library hpack, once each, because a table of size 0 makes them mean the same every time.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import unquote

from hpack import Decoder, Encoder, HPACKError
from hpack.struct import NeverIndexedHeaderTuple

from tidegate.kernel.protocol.envelope import Buffer

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    0,
    1,
    3,
    4,
    6,
    7,
    8,
    9,
)
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 2, 4, 5
_REFUSED_STREAM, _CANCEL = 7, 8
_UNKNOWN, _INTERNAL = 2, 13
_WINDOW_MAX = 2**31 - 1
_DEFAULT_WINDOW = 65_535
_LAST_STREAM = 2**31 - 1
# What comes is put together frame by frame, so these are kept small.
_FRAME_TAKEN = 256 * 1024
# Largest header block that is put together, and most acknowledgements owed to a server that does not read.
_BLOCK_TAKEN = 64 * 1024
_ACKS_OWED = 10_000
# How often a call that the server did not begin is sent again.
_AGAIN = 2
# How much of what has come is given back to the sender's window at once.
_REPLENISH = 2**30
_FRAME = struct.Struct(">HBBBI")


class Gone(Exception):
    """The connection could not be made, or ended under the call."""


class NotBegun(Gone):
    """The server said that it did not begin the call: it may be sent again, whatever it does."""


class _Broken(Exception):
    """The server broke a rule of HTTP/2."""


class Failed(Exception):
    """The server's own word: a gRPC status other than OK, or what over HTTP stands for one."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(slots=True)
class _Call:
    answer: asyncio.Future[Buffer]
    window: int
    unsent: deque[Buffer] = field(default_factory=deque)
    parts: list[Buffer] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


class UnaryChannel:
    """Calls of one method; connects when it is first used and again after the connection was lost."""

    def __init__(self, socket_path: str, method: str) -> None:
        self._path = socket_path
        self._head = _header_block(method)
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()

    async def call(self, message: Sequence[Buffer], timeout_s: float | None = None) -> Buffer:
        """Send a message, in pieces that are not joined, and give the answer's bytes.

        Cancelling the task resets the stream, which cancels the call at the server, as the time limit does.
        A call that the server did not begin is sent again. Raises Failed, Gone and TimeoutError.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for _ in range(_AGAIN):
            try:
                return await self._call_once(message, timeout_s)
            except NotBegun:
                timeout_s = None if end is None else max(0.0, end - time.monotonic())
        return await self._call_once(message, timeout_s)

    async def _call_once(self, message: Sequence[Buffer], timeout_s: float | None) -> Buffer:
        connection = self._connection
        if connection is None or not connection.usable:
            began = time.monotonic()
            async with asyncio.timeout(timeout_s):
                connection = await self._connect()
            timeout_s = None if timeout_s is None else timeout_s - (time.monotonic() - began)
        return await connection.call(self._head, message, timeout_s)

    def close(self) -> None:
        """End the connection; calls under way raise Gone."""
        if self._connection is not None:
            self._connection.close("closed")

    async def _connect(self) -> _Connection:
        async with self._connecting:
            if self._connection is None or not self._connection.usable:
                loop = asyncio.get_running_loop()
                try:
                    _, self._connection = await loop.create_unix_connection(_Connection, self._path)
                except OSError as error:
                    raise Gone(f"no connection: {error.strerror or error}") from None
            return self._connection


class _Connection(asyncio.Protocol):
    """One HTTP/2 connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._calls: dict[int, _Call] = {}
        self._next = 1
        self._buffer = b""
        self._window = _DEFAULT_WINDOW
        self._first_window = _DEFAULT_WINDOW
        self._frame_size = 16_384
        self._taken = 0
        self._block: bytes | None = None
        self._block_of = (0, 0)
        self._paused = False
        self._owed = 0
        self._seen: dict[bytes, dict[str, str]] = {}
        self._problem = ""
        self._draining = False

    @property
    def usable(self) -> bool:
        """Whether new calls may begin here."""
        return not self._problem and not self._draining

    async def call(self, head: bytes, message: Sequence[Buffer], timeout_s: float | None) -> Buffer:
        """One call; see :meth:`UnaryChannel.call`."""
        if self._problem:
            raise Gone(self._problem)
        id_, self._next = self._next, self._next + 2
        if self._next > _LAST_STREAM:
            self._draining = True
        loop = asyncio.get_running_loop()
        call = _Call(loop.create_future(), self._first_window)
        self._calls[id_] = call
        size = sum(map(len, message))
        out: list[Buffer] = [_frame(len(head), _HEADERS, _END_HEADERS, id_), head]
        total = size + 5
        if total <= self._frame_size and total <= call.window and total <= self._window:
            self._window -= total
            out += (_frame(total, _DATA, _END_STREAM, id_) + struct.pack(">BI", 0, size), *message)
            self._transport.write(b"".join(out))
        else:
            self._transport.write(b"".join(out))
            call.unsent.extend((struct.pack(">BI", 0, size), *message))
            self._send(id_, call)
        # A timer and not asyncio.timeout, which costs a light model's call several times as much.
        timer = None if timeout_s is None else loop.call_later(timeout_s, self._expire, id_)
        try:
            return await call.answer
        except asyncio.CancelledError:
            if self._calls.pop(id_, None) is not None:
                self._reset(id_)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if self._draining and not self._calls:
                self.close("drained")

    def close(self, why: str) -> None:
        """End it."""
        self._end(why)
        self._transport.close()

    def _send(self, id_: int, call: _Call) -> None:
        """As much of a message as the windows let through."""
        while call.unsent:
            room = min(self._window, call.window, self._frame_size)
            if room <= 0:
                return
            piece = call.unsent.popleft()
            if len(piece) > room:
                view = memoryview(piece)
                call.unsent.appendleft(view[room:])
                piece = view[:room]
            flags = 0 if call.unsent else _END_STREAM
            self._transport.writelines((_frame(len(piece), _DATA, flags, id_), piece))
            self._window -= len(piece)
            call.window -= len(piece)

    def _send_all(self) -> None:
        for id_, call in list(self._calls.items()):
            if self._window <= 0:
                return
            if call.unsent:
                self._send(id_, call)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first words of a client."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        settings = struct.pack(
            ">HIHIHIHI",
            _HEADER_TABLE_SIZE, 0, _ENABLE_PUSH, 0,
            _INITIAL_WINDOW_SIZE, _WINDOW_MAX, _MAX_FRAME_SIZE, _FRAME_TAKEN,
        )  # fmt: skip
        more = struct.pack(">I", _WINDOW_MAX - _DEFAULT_WINDOW)
        self._transport.write(
            _PREFACE
            + _frame(len(settings), _SETTINGS, 0, 0)
            + settings
            + _frame(4, _WINDOW_UPDATE, 0, 0)
            + more
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has gone."""
        self._end(f"the connection was lost{f': {exc}' if exc else ''}")

    def pause_writing(self) -> None:
        """The server does not read."""
        self._paused = True

    def resume_writing(self) -> None:
        """The server reads again."""
        self._paused, self._owed = False, 0

    def data_received(self, data: bytes) -> None:
        """Take frames, and parts of frames; a server that breaks the rules is one that is gone."""
        if self._problem:
            return
        try:
            self._read_frames(self._buffer + data if self._buffer else data)
        except (_Broken, struct.error, HPACKError, ValueError, IndexError) as error:
            self.close(f"the server broke HTTP/2: {error}")

    def _read_frames(self, buffer: bytes) -> None:
        at, end = 0, len(buffer)
        while end - at >= 9:
            high, low, kind, flags, id_ = _FRAME.unpack_from(buffer, at)
            size = high << 8 | low
            if size > _FRAME_TAKEN:
                raise _Broken(f"a frame of {size} bytes")
            if end - at - 9 < size:
                break
            if self._block is not None and kind != _CONTINUATION:
                raise _Broken("another frame came inside a header block")
            self._on_frame(kind, flags, id_ & _LAST_STREAM, buffer[at + 9 : at + 9 + size])
            at += 9 + size
        self._buffer = buffer[at:]

    def _on_frame(self, kind: int, flags: int, id_: int, payload: bytes) -> None:
        if kind == _DATA:
            self._on_data(id_, payload, flags)
        elif kind in {_HEADERS, _CONTINUATION}:
            self._on_headers(id_, payload, flags, kind)
        elif kind == _WINDOW_UPDATE:
            self._on_window(id_, payload)
        elif kind == _SETTINGS and not flags & _ACK:
            self._on_settings(payload)
        elif kind == _PING and not flags & _ACK:
            if len(payload) != 8:
                raise _Broken("a PING that is not 8 bytes")
            self._acknowledge(_frame(8, _PING, _ACK, 0) + payload)
        elif kind == _RST_STREAM:
            (code,) = struct.unpack(">I", payload)
            self._on_reset(id_, code)
        elif kind == _GOAWAY:
            self._on_goaway(payload)

    def _acknowledge(self, frame: bytes) -> None:
        self._owed += self._paused
        if self._owed > _ACKS_OWED:
            raise _Broken("it sends frames and does not read the answers")
        self._transport.write(frame)

    def _on_reset(self, id_: int, code: int) -> None:
        if code == _REFUSED_STREAM:
            # By RFC 9113, 8.7, nothing of the call has been processed.
            self._fail(id_, NotBegun("the server did not take the call"))
        else:
            self._fail(id_, Failed(_INTERNAL, f"the server reset the call (HTTP/2 error {code})"))

    def _on_data(self, id_: int, payload: bytes, flags: int) -> None:
        self._taken += len(payload)
        if self._taken >= _REPLENISH:
            self._transport.write(_frame(4, _WINDOW_UPDATE, 0, 0) + struct.pack(">I", self._taken))
            self._taken = 0
        call = self._calls.get(id_)
        if call is None:
            return  # cancelled
        call.parts.append(_unpadded(payload, flags))
        if flags & _END_STREAM:
            self._finish(id_, call)

    def _on_headers(self, id_: int, payload: bytes, flags: int, kind: int) -> None:
        if kind == _HEADERS:
            payload = _unpadded(payload, flags)
            block = payload[5:] if flags & _PRIORITY else payload
            self._block_of = (id_, flags & _END_STREAM)
        elif self._block is None or id_ != self._block_of[0]:
            raise _Broken("a CONTINUATION frame without a header block")
        else:
            block = self._block + payload
        if len(block) > _BLOCK_TAKEN:
            raise _Broken(f"a header block of more than {_BLOCK_TAKEN} bytes")
        if not flags & _END_HEADERS:
            self._block = block
            return
        self._block = None
        found = self._seen.get(block)
        if found is None:
            found = self._read(block)
        call = self._calls.get(id_)
        if call is not None:
            call.headers = found if not call.headers else {**call.headers, **found}
            if self._block_of[1]:
                self._finish(id_, call)

    def _read(self, block: bytes) -> dict[str, str]:
        decoder = Decoder()
        decoder.max_allowed_table_size = 0
        decoder.header_table_size = 0
        found = {str(name): str(value) for name, value in decoder.decode(block)}
        if len(self._seen) < 256:
            self._seen[block] = found
        return found

    def _on_window(self, id_: int, payload: bytes) -> None:
        more = struct.unpack(">I", payload)[0] & _WINDOW_MAX
        if id_ == 0:
            self._window = _checked(self._window + more)
            self._send_all()
        elif (call := self._calls.get(id_)) is not None:
            call.window = _checked(call.window + more)
            self._send(id_, call)

    def _on_settings(self, payload: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _MAX_FRAME_SIZE:
                if not 16_384 <= value < 2**24:
                    raise _Broken(f"a largest frame of {value} bytes")
                self._frame_size = value
            elif name == _INITIAL_WINDOW_SIZE:
                _checked(value)
                for call in self._calls.values():
                    call.window += value - self._first_window
                self._first_window = value
        self._acknowledge(_frame(0, _SETTINGS, _ACK, 0))
        self._send_all()

    def _on_goaway(self, payload: bytes) -> None:
        self._draining = True
        last = struct.unpack_from(">I", payload)[0] & _LAST_STREAM
        for id_ in [id_ for id_ in self._calls if id_ > last]:
            self._fail(id_, NotBegun("the server is going away"))

    def _finish(self, id_: int, call: _Call) -> None:
        del self._calls[id_]
        if call.answer.done():
            return
        told = call.headers.get("grpc-status", "")
        status = int(told) if told.isascii() and told.isdigit() and len(told) < 4 else _UNKNOWN
        if status:
            message = unquote(call.headers.get("grpc-message", "")) or f"gRPC status {status}"
            call.answer.set_exception(Failed(status, message))
            return
        body = call.parts[0] if len(call.parts) == 1 else b"".join(call.parts)
        if len(body) < 5 or body[0] or int.from_bytes(body[1:5], "big") != len(body) - 5:
            call.answer.set_exception(Failed(_INTERNAL, "expected one uncompressed message as the answer"))
            return
        call.answer.set_result(memoryview(body)[5:])

    def _expire(self, id_: int) -> None:
        if id_ in self._calls:
            self._fail(id_, TimeoutError())
            self._reset(id_)

    def _reset(self, id_: int) -> None:
        if not self._problem:
            self._transport.write(_frame(4, _RST_STREAM, 0, id_) + struct.pack(">I", _CANCEL))

    def _fail(self, id_: int, error: Exception) -> None:
        call = self._calls.pop(id_, None)
        if call is not None and not call.answer.done():
            call.answer.set_exception(error)

    def _end(self, why: str) -> None:
        self._problem = self._problem or why
        for id_ in list(self._calls):
            self._fail(id_, Gone(self._problem))


def _frame(size: int, kind: int, flags: int, id_: int) -> bytes:
    return _FRAME.pack(size >> 8, size & 0xFF, kind, flags, id_)


def _unpadded(payload: bytes, flags: int) -> bytes:
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise _Broken("more padding than payload")
    return payload[1 : len(payload) - payload[0]]


def _checked(window: int) -> int:
    if window > _WINDOW_MAX:
        raise _Broken("a window of more than 2^31-1")
    return window


def _header_block(method: str) -> bytes:
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    )
    # Never indexed: so the block needs no table and is the same on every connection.
    block: bytes = Encoder().encode([NeverIndexedHeaderTuple(*pair) for pair in fields], huffman=False)
    return block
