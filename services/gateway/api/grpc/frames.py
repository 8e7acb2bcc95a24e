"""Encode HTTP/2 frames (RFC 9113) and header blocks (RFC 7541), as far as a gRPC server needs them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = range(5)
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(5, 10)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 4, 5
MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE = 3, 6
LAST_STREAM = 2**31 - 1
WINDOW_MAX = 2**31 - 1
DEFAULT_WINDOW = 65_535
DEFAULT_FRAME = 16_384

HEAD = struct.Struct(">HBBBI")


class ErrorCode(IntEnum):
    """Error codes of HTTP/2."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class ProtocolError(Exception):
    """An error of the client, which broke the protocol or a limit.

    ``code``: the error code with which the connection ends.
    """

    def __init__(self, code: ErrorCode, why: str) -> None:
        super().__init__(why)
        self.code = code


def frame_head(size: int, kind: int, flags: int, stream: int) -> bytes:
    """Return the header of a frame: the nine bytes before its payload."""
    return HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream)


def reset(stream: int, code: ErrorCode) -> bytes:
    """Return a RST_STREAM frame."""
    return frame_head(4, RST_STREAM, 0, stream) + struct.pack(">I", code)


def window_update(stream: int, more: int) -> bytes:
    """Return a WINDOW_UPDATE frame."""
    return frame_head(4, WINDOW_UPDATE, 0, stream) + struct.pack(">I", more)


def goaway(last: int, code: ErrorCode, why: str) -> bytes:
    """Return a GOAWAY frame."""
    words = why.encode()[:256]
    return frame_head(8 + len(words), GOAWAY, 0, 0) + struct.pack(">II", last, code) + words


def settings(values: Iterable[tuple[int, int]]) -> bytes:
    """Return a SETTINGS frame."""
    payload = b"".join(struct.pack(">HI", name, value) for name, value in values)
    return frame_head(len(payload), SETTINGS, 0, 0) + payload


def unpadded(payload: bytes, flags: int) -> bytes:
    """Return the payload of DATA or HEADERS without padding.

    Raise ProtocolError if the padding is larger than the payload.
    """
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - payload[0]]


def header_block(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return a header block of literal fields. It uses no table, so it means the same on every connection."""
    out = bytearray()
    for name, value in fields:
        _literal(out, name.encode("latin-1", "replace"), 0x10)
        _literal(out, value.encode("latin-1", "replace"), None)
    return bytes(out)


def _literal(out: bytearray, text: bytes, first: int | None) -> None:
    if first is not None:
        out.append(first)
    size = len(text)
    if size < 127:
        out.append(size)
    else:
        out.append(127)
        size -= 127
        while size >= 128:
            out.append(size & 0x7F | 0x80)
            size >>= 7
        out.append(size)
    out += text
