"""Encode and decode AMQP 0-9-1 frames. Pure: no socket, no clock.

Each request needs several publishes, deliveries, acks and confirms. This module packs and parses these four
itself, because that is faster. pamqp handles every other method. The layout of a frame is that of the AMQP
0-9-1 specification: u8 type | u16 channel | u32 size | payload | 0xCE.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pamqp import decode, encode, frame
from pamqp.base import Frame

FRAME_END = 0xCE
METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
HEARTBEAT_FRAME = b"\x08\x00\x00\x00\x00\x00\x00\xce"

_HEAD = struct.Struct(">BHI")
_CONTENT = struct.Struct(">BHIHHQH")
_ACK = struct.Struct(">BHIHHQBB")
_INDEX = struct.Struct(">HH")
_TAG = struct.Struct(">Q")

_DELIVER, _GOT, _RETURN, _ACKED, _NACKED = (60, 60), (60, 71), (60, 50), (60, 80), (60, 120)
_WITH_CONTENT = (_DELIVER, _GOT, _RETURN)
_PUBLISH = b"\x00\x3c\x00\x28\x00\x00"

# The flags of content properties, in the order of the properties in a frame.
_CONTENT_TYPE, _ENCODING, _HEADERS, _MODE, _PRIORITY = 0x8000, 0x4000, 0x2000, 0x1000, 0x0800
_CORRELATION, _REPLY_TO, _EXPIRATION, _MESSAGE_ID = 0x0400, 0x0200, 0x0100, 0x0080
_STRINGS_BEFORE_HEADERS = (_CONTENT_TYPE, _ENCODING)
_STRINGS_AFTER_PRIORITY = (_CORRELATION, _REPLY_TO, _EXPIRATION, _MESSAGE_ID)


# The largest frame size that we offer to RabbitMQ. One large frame costs us and RabbitMQ less work than many
# small frames.
FRAME_MAX = 1_048_576
# The type, channel, size and end byte of a frame take this many bytes together.
_AROUND = 8
# A content is the body of a message. A content of LARGE bytes or more is received directly into its own
# buffer, without copies. A content of more than MOST bytes is malformed, because RabbitMQ accepts no larger
# messages.
LARGE = 64 * 1024
MOST = 16 * 2**20

Buffer = bytes | memoryview


class MalformedFrame(Exception):
    """The error for bytes that are not AMQP frames."""


class Properties(NamedTuple):
    """The content properties that Tidegate uses."""

    persistent: bool = False
    reply_to: str | None = None
    expiration: str | None = None
    message_id: str | None = None
    headers: dict[str, Any] | None = None


class Delivered(NamedTuple):
    """``basic.deliver`` with its content. If ``consumer_tag`` is empty, this is ``basic.get-ok``."""

    consumer_tag: str
    tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    properties: Properties
    body: Buffer


class Returned(NamedTuple):
    """``basic.return``: the broker returns a mandatory message, because no queue takes it.

    Of the message, only the properties are stored.
    """

    properties: Properties


class Confirmed(NamedTuple):
    """The broker's confirm of a published message: ``basic.ack`` (``taken`` is true) or ``basic.nack``."""

    tag: int
    multiple: bool
    taken: bool


class AmqpMethod(NamedTuple):
    """Any other method, decoded by pamqp."""

    channel: int
    frame: Any


class Heartbeat(NamedTuple):
    """A heartbeat frame of AMQP. It only shows that the broker still answers."""


Event = Delivered | Returned | Confirmed | AmqpMethod | Heartbeat


def publish(
    channel: int,
    exchange: bytes,
    routing_key: bytes,
    *,
    mandatory: bool,
    properties: Properties,
    pieces: Sequence[Buffer],
    frame_max: int,
) -> list[Buffer]:
    """Return ``basic.publish`` with its content, in frames of at most ``frame_max`` bytes.

    The content consists of the ``pieces`` in order. The result contains the pieces, or slices of them,
    without copies.
    """
    size = sum(map(len, pieces))
    method = b"".join(
        (
            _PUBLISH,
            bytes((len(exchange),)),
            exchange,
            bytes((len(routing_key),)),
            routing_key,
            b"\x01" if mandatory else b"\x00",
        )
    )
    flags, values = _packed(properties)
    parts: list[Buffer] = [
        _HEAD.pack(METHOD, channel, len(method)),
        method,
        b"\xce",
        _CONTENT.pack(HEADER, channel, 14 + len(values), 60, 0, size, flags),
        values,
        b"\xce",
    ]
    if 0 < size <= frame_max - _AROUND:
        parts += (_HEAD.pack(BODY, channel, size), *pieces, b"\xce")
    elif size:
        parts += _frames(channel, pieces, size, frame_max - _AROUND)
    return parts


def _frames(channel: int, pieces: Sequence[Buffer], left: int, room: int) -> Iterator[Buffer]:
    """Yield body frames, each with at most ``room`` bytes of content.

    ``left``: the sum of the pieces' sizes.
    """
    free = 0
    for piece in pieces:
        view = memoryview(piece)
        while len(view):
            if not free:
                free = min(room, left)
                yield _HEAD.pack(BODY, channel, free)
            part, view = view[:free], view[free:]
            yield part
            free -= len(part)
            left -= len(part)
            if not free:
                yield b"\xce"


def _packed(properties: Properties) -> tuple[int, bytes]:
    flags, parts = _MODE, [b"\x02" if properties.persistent else b"\x01"]
    if properties.headers:
        flags |= _HEADERS
        parts.insert(0, encode.field_table(properties.headers))
    for flag, value in (
        (_REPLY_TO, properties.reply_to),
        (_EXPIRATION, properties.expiration),
        (_MESSAGE_ID, properties.message_id),
    ):
        if value is not None:
            flags |= flag
            raw = value.encode()
            parts += (bytes((len(raw),)), raw)
    return flags, b"".join(parts)


def ack(channel: int, tag: int, multiple: bool) -> bytes:
    """Return the frame of ``basic.ack``."""
    return _ACK.pack(METHOD, channel, 13, 60, 80, tag, multiple, FRAME_END)


class FrameReader:
    """A decoder that turns bytes into events. A complete message becomes one event.

    A large content is received directly into its own buffer. While :meth:`window` returns a part of this
    buffer, the calling code must write the next bytes of the stream there. Then it must call :meth:`took`
    with the number of these bytes. It passes all other bytes to :meth:`feed`.
    """

    def __init__(self) -> None:
        self.frame_max = FRAME_MAX  # the negotiated limit; a larger frame is malformed
        self._rest = b""
        self._method: Delivered | Returned | None = None
        self._missing = 0
        self._pieces: list[bytes] = []
        self._content: memoryview | None = None  # the large content that is being received
        self._inside = False  # True in a body frame of this content. _left: missing bytes of this frame
        self._left = 0

    def window(self) -> memoryview | None:
        """Return the buffer for the next bytes of a large content.

        Return None if the next bytes are not content.
        """
        if self._content is None or not self._left:
            return None
        at = len(self._content) - self._missing
        return self._content[at : at + self._left]

    def took(self, count: int) -> None:
        """Record that ``count`` bytes were written into the window."""
        self._missing -= count
        self._left -= count

    def appetite(self, limit: int) -> int:
        """Return the highest number of bytes that the next call of :meth:`feed` may get.

        Between two body frames of a large content, :meth:`feed` may get only the end byte of the first frame
        and the head of the second. So the content of the second frame is received through :meth:`window`,
        without a copy. In all other cases the result is ``limit``.
        """
        if self._content is None or not self._missing:
            return limit
        return max(1, self._inside + _HEAD.size - len(self._rest))

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yield the events that ``data`` completes. Raises :class:`MalformedFrame`."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while True:
            if self._inside:
                at, self._inside = self._fill(data, at)
                if self._inside:
                    break
                if not self._missing and self._content is not None:
                    content, self._content = self._content, None
                    yield self._whole(content.toreadonly())
            if end - at < 7:
                break
            kind, channel, size = _HEAD.unpack_from(data, at)
            if size > self.frame_max - _AROUND:
                raise MalformedFrame(
                    f"a frame of {size + _AROUND} bytes; the agreed limit is {self.frame_max}"
                )
            if kind == BODY and self._content is not None:
                self._enter(size)
                at += 7
                continue
            after = at + 7 + size
            if after >= end:
                break
            if data[after] != FRAME_END:
                raise MalformedFrame(f"a frame of type {kind} and {size} bytes does not end where it says")
            event = self._frame(kind, channel, data, at, after)
            if event is not None:
                yield event
            at = after + 1
        self._rest = data[at:] if at else data

    def _enter(self, size: int) -> None:
        """Record that a body frame with ``size`` bytes of a large content begins. Raises MalformedFrame."""
        if size > self._missing:
            raise MalformedFrame("a message has more content than its header says")
        self._inside, self._left = True, size

    def _fill(self, data: bytes, at: int) -> tuple[int, bool]:
        """Copy the bytes of a body frame into the large content.

        Return the offset in ``data`` after the bytes that were used. Also return True if the frame is not
        complete, else False.
        """
        place = self.window()
        if place is not None:
            piece = memoryview(data)[at : at + len(place)]
            place[: len(piece)] = piece
            self.took(len(piece))
            at += len(piece)
        if self._left or at == len(data):
            return at, True
        if data[at] != FRAME_END:
            raise MalformedFrame("a frame of a large content does not end where it says")
        return at + 1, False

    def _frame(self, kind: int, channel: int, data: bytes, at: int, end: int) -> Event | None:
        start = at + 7
        try:
            if kind == METHOD:
                return self._on_method(channel, data, at, start, end)
            if kind == HEADER:
                return self._on_header(data, start, end)
            if kind == BODY:
                return self._on_body(data[start:end])
            if kind == HEARTBEAT:
                return Heartbeat()
        except MalformedFrame:
            raise
        except Exception as error:
            # Here pamqp raises errors of many types: its own errors, and errors of the standard library that
            # come from struct, from decoding of texts and times, and from recursion.
            raise MalformedFrame(f"a frame of type {kind} cannot be read: {error!r}") from error
        raise MalformedFrame(f"unknown frame type {kind}")

    def _on_method(self, channel: int, data: bytes, at: int, start: int, end: int) -> Event | None:
        index = _INDEX.unpack_from(data, start)
        start += 4
        if index in _WITH_CONTENT and self._missing:
            raise MalformedFrame("a message begins in the middle of another message's content")
        if index == _DELIVER:
            consumer_tag, start = _short(data, start)
            (tag,) = _TAG.unpack_from(data, start)
            redelivered = data[start + 8] != 0
            exchange, start = _short(data, start + 9)
            routing_key, start = _short(data, start)
            _check_end(start, end)
            self._method = Delivered(consumer_tag, tag, redelivered, exchange, routing_key, Properties(), b"")
            return None
        if index == _GOT:
            self._method = _got(data, start, end)
            return None
        if index in (_ACKED, _NACKED):
            (tag,) = _TAG.unpack_from(data, start)
            _check_end(start + 9, end)
            return Confirmed(tag, bool(data[start + 8] & 1), index == _ACKED)
        if index == _RETURN:
            self._method = Returned(Properties())
            return None
        _, _, found = frame.unmarshal(data[at : end + 1])
        return AmqpMethod(channel, found)

    def _on_header(self, data: bytes, start: int, end: int) -> Event | None:
        if self._method is None or self._missing:
            raise MalformedFrame("a content header arrived without its method")
        size, flags = struct.unpack_from(">QH", data, start + 4)
        if size > MOST:
            raise MalformedFrame(f"a content of {size} bytes; the limit is {MOST}")
        properties = _properties(data, start + 14, end, flags)
        self._method, self._missing = self._method._replace(properties=properties), size
        if self._missing >= LARGE:
            self._content = memoryview(bytearray(self._missing))
        return None if self._missing else self._whole(b"")

    def _on_body(self, piece: bytes) -> Event | None:
        self._missing -= len(piece)
        if self._missing < 0 or self._method is None:
            raise MalformedFrame("a message has more content than its header says")
        if self._missing:
            self._pieces.append(piece)
            return None
        if self._pieces:
            piece = b"".join((*self._pieces, piece))
            self._pieces.clear()
        return self._whole(piece)

    def _whole(self, body: Buffer) -> Event:
        method, self._method = self._method, None
        assert method is not None
        return method._replace(body=body) if isinstance(method, Delivered) else method


def _got(data: bytes, start: int, end: int) -> Delivered:
    (tag,) = _TAG.unpack_from(data, start)
    exchange, at = _short(data, start + 9)
    routing_key, at = _short(data, at)
    _check_end(at + 4, end)  # the last 4 bytes of basic.get-ok count waiting messages and are not used
    return Delivered("", tag, data[start + 8] != 0, exchange, routing_key, Properties(), b"")


def _check_end(at: int, end: int) -> None:
    """Raise MalformedFrame if a field's end (``at``) is after the end of its frame (``end``)."""
    if at > end:
        raise MalformedFrame("a field reaches past its frame")


def _short(data: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + data[at]
    return data[at + 1 : end].decode(), end


def _properties(data: bytes, at: int, end: int, flags: int) -> Properties:
    """Return the properties up to ``message-id``. Tidegate does not use the properties after it."""
    for flag in _STRINGS_BEFORE_HEADERS:
        if flags & flag:
            _, at = _short(data, at)
    headers = None
    if flags & _HEADERS:
        used, headers = decode.field_table(data[at:end])
        at += used
    persistent = bool(flags & _MODE) and data[at] == 2
    at += (1 if flags & _MODE else 0) + (1 if flags & _PRIORITY else 0)
    found: dict[int, str] = {}
    for flag in _STRINGS_AFTER_PRIORITY:
        if flags & flag:
            found[flag], at = _short(data, at)
    _check_end(at, end)
    return Properties(
        persistent, found.get(_REPLY_TO), found.get(_EXPIRATION), found.get(_MESSAGE_ID), headers
    )


def method(channel: int, command: Frame) -> bytes:
    """Return the frame of an AMQP method. pamqp encodes it."""
    return frame.marshal(command, channel)
