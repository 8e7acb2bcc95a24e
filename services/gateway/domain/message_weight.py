"""Count the bytes of structure in a serialized ``ModelInferRequest``, to limit its memory.

Structure is everything except raw tensors. Parsing makes it larger. With the protobuf parser upb, each
serialized byte takes this many bytes of memory after parsing: 44 for empty inputs, 8 for typed contents and
shapes, 1 for raw tensors.
"""

from __future__ import annotations

from tidegate.kernel.errors import BadRequest

# A request may have at most this many top-level fields: inputs, outputs, parameters and raw tensors.
FIELDS = 4096
# Bytes of memory that parsing adds per byte of structure. Only empty inputs need more, and FIELDS limits
# their number.
FACTOR = 8
RAW_INPUT_CONTENTS = 7
_VARINT, _I64, _BYTES, _I32 = 0, 1, 2, 5


def structure(message: bytes | bytearray) -> int:
    """Return the number of bytes outside ``raw_input_contents``; raise BadRequest for too many fields.

    If the message is malformed, all bytes after the fault count as structure. The parser raises the error
    later.
    """
    at, end, raw = 0, len(message), 0
    for _ in range(FIELDS):
        if at >= end:
            return end - raw
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(message, at)
            if tag >> 3 == RAW_INPUT_CONTENTS:
                raw += min(size, end - at)
            at += size
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in (_I64, _I32):
            at += 8 if kind == _I64 else 4
        else:
            return end - raw
    if at < end:
        raise BadRequest(f"the request has more than {FIELDS} inputs, outputs, parameters and raw tensors")
    return end - raw


def _varint(message: bytes | bytearray, at: int) -> tuple[int, int]:
    """Return the varint at offset ``at``, and the offset after it.

    If the varint is invalid, return 0 and the message's length.
    """
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, len(message)
