"""A client that writes raw HTTP/2 frames, to send input that no library would send."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Iterable
from typing import NamedTuple

from hpack import Decoder, Encoder

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
INFER = "/inference.GRPCInferenceService/ModelInfer"
WATCH = "/grpc.health.v1.Health/Watch"


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def window_update(stream: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", more))


def message(data: bytes, size: int | None = None) -> bytes:
    """Return a gRPC message; ``size``: a false length for its prefix."""
    return struct.pack(">BI", 0, len(data) if size is None else size) + data


class Raw:
    """One connection. Received frames are in ``frames``; our own windows are never full."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.closed = asyncio.Event()
        self.windows: dict[int, int] = {0: 65_535}
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._first = 65_535
        self._news = asyncio.Condition()

    async def open(self, port: int, tls: ssl.SSLContext | None = None, *, greet: bool = True) -> Raw:
        self._reader, self.writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        self._task = asyncio.create_task(self._read())
        if greet:
            settings = struct.pack(">HI", 4, 2**31 - 1)
            self.send(PREFACE, frame(SETTINGS, 0, 0, settings), window_update(0, 2**30))
        return self

    def send(self, *pieces: bytes) -> None:
        self.writer.writelines(pieces)

    def headers(
        self, stream: int, path: str = INFER, more: Iterable[tuple[str, str]] = (), flags: int = END_HEADERS
    ) -> bytes:
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *more,
        ]
        return frame(HEADERS, flags, stream, self._encoder.encode(fields))

    async def upload(self, stream: int, size: int, *, declared: int | None = None) -> int:
        """Begin a message and send ``size`` bytes as the windows allow; return how many were sent."""
        self.windows.setdefault(stream, self._first)
        rest = struct.pack(">BI", 0, size if declared is None else declared) + bytes(65_536)
        sent = 0
        while sent < size and not self.closed.is_set():
            room = min(16_384, size - sent, self.windows[0], self.windows[stream])
            if room <= 0:
                try:
                    async with asyncio.timeout(30), self._news:
                        await self._news.wait()
                except TimeoutError:
                    break
                if self.ended(stream):
                    break
                continue
            self.send(frame(DATA, 0, stream, rest[:room]))
            rest = bytes(65_536)
            self.windows[0] -= room
            self.windows[stream] -= room
            sent += room
            try:
                await self.writer.drain()
            except ConnectionError:
                break
            if self.ended(stream):
                break
        return sent

    def ended(self, stream: int) -> bool:
        """Return True if the server has ended the stream."""
        return any(
            f.stream == stream
            and (f.kind == RST_STREAM or (f.kind in {DATA, HEADERS} and f.flags & END_STREAM))
            for f in self.frames
        )

    async def until(self, found: object, patience_s: float = 120) -> None:
        """Wait until ``found()`` is true; it is asked again after each frame."""
        assert callable(found)
        async with asyncio.timeout(patience_s):
            while not found():
                async with self._news:
                    if not found():
                        await self._news.wait()

    async def answer(self, stream: int) -> dict[str, str]:
        """Return all headers and trailers of a response, once the stream has ended."""
        await self.until(lambda: self.ended(stream))
        found: dict[str, str] = {}
        for got in self.frames:
            if got.kind == HEADERS:
                fields = {str(name): str(value) for name, value in self._decoder.decode(got.payload)}
                if got.stream == stream:
                    found |= fields
        return found

    def goaway(self) -> tuple[int, int, bytes] | None:
        """Return last stream, error code and message of the last GOAWAY."""
        for got in reversed(self.frames):
            if got.kind == GOAWAY:
                last, code = struct.unpack_from(">II", got.payload)
                return last, code, got.payload[8:]
        return None

    async def close(self) -> None:
        self.writer.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                size = int.from_bytes(head[:3], "big")
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = await self._reader.readexactly(size)
                self._on_frame(Frame(kind, flags, stream, payload))
                async with self._news:
                    self._news.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            self.closed.set()
            async with self._news:
                self._news.notify_all()

    def _on_frame(self, got: Frame) -> None:
        self.frames.append(got)
        if got.kind == WINDOW_UPDATE:
            (more,) = struct.unpack(">I", got.payload)
            self.windows[got.stream] = self.windows.get(got.stream, self._first) + more
        elif got.kind == SETTINGS and not got.flags & ACK:
            for name, value in struct.iter_unpack(">HI", got.payload):
                if name == 4:
                    self.windows = {
                        s: w if s == 0 else w + value - self._first for s, w in self.windows.items()
                    }
                    self._first = value
            self.send(frame(SETTINGS, ACK, 0))
