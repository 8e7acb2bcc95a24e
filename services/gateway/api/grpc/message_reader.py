"""Read the messages of one call. The memory budget counts their bytes as they arrive."""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.decompression import Decompressor
from tidegate.kernel.errors import BadRequest, PayloadTooLarge, TidegateError

_PREFIX = struct.Struct(">BI")
_UNPACKED = {b"gzip", b"deflate"}
ENCODINGS = "identity,deflate,gzip"
# The bytes of memory that a message takes in addition to its data.
MESSAGE_BYTES = 256


class ReceivedMessage(NamedTuple):
    """A complete message. ``held``: the bytes that the memory budget counts for it."""

    data: bytes | bytearray
    held: int


class MessageReader:
    """A reader that assembles messages from the payloads of DATA frames."""

    __slots__ = (
        "_encoding",
        "_held",
        "_limit",
        "_limits",
        "_packed",
        "_part",
        "_prefix",
        "_size",
        "known",
        "messages",
    )

    def __init__(self, limits: BodyLimits, limit: int, encoding: bytes) -> None:
        """``limit``: the most bytes of a message."""
        self._limits = limits
        self._limit = limit
        self._encoding = encoding
        self._prefix = b""
        self._part: bytearray | None = None
        self._size = 0
        self._packed = False
        self._held = 0
        self.known = False  # True: the caller has sent a valid credential
        self.messages: deque[ReceivedMessage] = deque()

    @property
    def begun(self) -> bool:
        """Return True if only a part of a message has arrived."""
        return self._part is not None or bool(self._prefix)

    @property
    def size(self) -> int:
        """Return the declared size of the incomplete message, or 0 if no message is incomplete."""
        return self._size if self._part is not None else 0

    def feed(self, data: bytes) -> None:
        """Read bytes of messages.

        Raise BadRequest if a compressed message cannot be decompressed. Raise PayloadTooLarge if a message is
        larger than the limit. Raise Overloaded if the memory budget is full.
        """
        if not self.begun and len(data) >= 5:
            packed, size = _PREFIX.unpack_from(data)
            if (
                size == len(data) - 5 and not packed and size <= self._limit
            ):  # usually, the data is one message
                self._count(size + MESSAGE_BYTES, size)
                self._add(data[5:])
                return
        at, end = 0, len(data)
        while at < end:
            if self._part is None:
                missing = 5 - len(self._prefix)
                self._prefix += data[at : at + missing]
                at += missing
                if len(self._prefix) < 5:
                    return
                self._begin()
            assert self._part is not None
            piece = data[at : at + self._size - len(self._part)]
            at += len(piece)
            self._count(len(piece), self._size)
            self._part += piece
            if len(self._part) == self._size:
                message, self._part = self._part, None
                self._add(self._unpacked(message) if self._packed else message)

    def take(self) -> ReceivedMessage:
        """Return the next complete message.

        After its use, the calling code must return the message's bytes to the memory budget.
        """
        return self.messages.popleft()

    def release(self) -> None:
        """Drop all messages that were not taken, and return their bytes to the memory budget."""
        self._limits.bodies.release(self._held + sum(message.held for message in self.messages))
        self._held = 0
        self._part = None
        self.messages.clear()

    def _begin(self) -> None:
        packed, self._size = _PREFIX.unpack(self._prefix)
        self._prefix, self._part = b"", bytearray()
        self._packed = bool(packed)
        if packed and self._encoding not in _UNPACKED:
            raise BadRequest(
                f"the message is compressed, but grpc-encoding is {self._encoding[:32]!r}: use gzip"
            )
        if self._size > self._limit:
            raise self._too_large()
        self._count(MESSAGE_BYTES, self._size)

    def _too_large(self) -> TidegateError:
        return PayloadTooLarge(f"the message is larger than {self._limit} bytes")

    def _count(self, count: int, of: int) -> None:
        if not self._limits.bodies.take(count, of, known=self.known):
            raise self._limits.overloaded()
        self._held += count

    def _add(self, data: bytes | bytearray) -> None:
        self.messages.append(ReceivedMessage(data, self._held))
        self._held = 0

    def _unpacked(self, data: bytearray) -> bytes:
        """Decompress a message. Meanwhile, the memory budget counts the input and the growing result."""
        decompressor = Decompressor(self._encoding.decode("latin-1"), "message")
        pieces, size = [], 0
        for piece in decompressor.feed(memoryview(data)):
            size += len(piece)
            if size > self._limit:
                raise self._too_large()
            self._count(len(piece), size)
            pieces.append(piece)
        decompressor.end()
        self._limits.bodies.release(len(data))
        self._held -= len(data)
        return b"".join(pieces)
