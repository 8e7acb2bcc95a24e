"""The wire format between gateway and worker: envelopes of frames. ``docs/envelope.md`` shows the layout.

An AMQP message is one envelope. An envelope carries 1..N frames. A frame is one request, one reply or one
cancelled id. All numbers are little-endian.

    envelope  "TG" | u8 version | u8 kind | u32 count | count x u32 frame length | frames
    request   16s id | u64 deadline, ms since the epoch | u32 rows | u8 attempt | u8 flags
              | u8 len tenant | u8 len trace | u32 len key | u16 inputs | tenant | trace | key
              | inputs x u32 byte size | inputs' raw bytes
    reply     16s id | u8 status | u8 attempt | u16 outputs | u32 seq | u32 rows | u32 wait us
              | u32 compute us | u32 requests in the call | u32 len key | key
              | outputs x u32 byte size | outputs' raw bytes
    cancels   16s id

``rows`` is the size of the batch axis, 0 if the model has none. Two requests may share a model call if their
``key`` is the same. The key has the inputs (names, datatypes, dims without the batch axis), the requested
outputs and the parameters. So a worker compares keys as bytes, and parses each distinct key once.

A request without the flag STREAM has one reply: OK or FAILED. A request with the flag STREAM has any number
of CHUNKs, numbered by ``seq`` from 0, and then END. The ``seq`` of END is the number of CHUNKs. FAILED may
come in place of any CHUNK or END. No reply follows FAILED.

Tensors that are too large for a message stay in the blob store. In that case the frame's only data is a claim
(:mod:`tidegate.kernel.protocol.claim`), marked by the flag CLAIM in a request or the bit CLAIMED in a reply's
status.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from tidegate.kernel.protocol.tensors import BY_CODE, DATATYPES, Datatype

MAGIC = b"TG"
VERSION = 1
READABLE = frozenset({1})
REQUESTS, REPLIES, CANCELS = 1, 2, 3

RETRY_SAFE, STREAM, CLAIM = 0x01, 0x02, 0x04
# Three bits of a request's flags are its priority: 1 is the highest and LAST_PRIORITY the lowest. 0 means
# that the request has no priority.
PRIORITY_SHIFT, LAST_PRIORITY = 4, 7
# The flag of a shadow copy of a request. A worker runs copies only after all other requests. If the worker is
# lost, the copy is dropped.
COPY = 0x80
OK, FAILED, CHUNK, END = 0, 1, 2, 3
CLAIMED = 0x80

_ENVELOPE = struct.Struct("<2sBBI")
_REQUEST = struct.Struct("<16sQIBBBBIH")
_REPLY = struct.Struct("<16sBBHIIIIII")
_ATTEMPT_AT = 28

# The most bytes of frames in one envelope. A larger frame is sent alone in an envelope. Its head and its
# tensors are then separate pieces, so that no tensor is copied.
LARGE = 256 * 1024

# The most bytes of a key. A key must be small, because every message contains its key, even if its tensors
# are in the blob store.
MAX_KEY = 64 * 1024
# Most keys repeat, so parsed keys of up to KEPT_KEY bytes are cached. Longer keys contain parameters of one
# caller and seldom repeat.
KEPT_KEY = 2048
_KEYS_KEPT = 4096

Buffer = bytes | memoryview


class Undecodable(ValueError):
    """An error: the bytes are not an envelope or a frame that this reader can read."""


class Tensor(NamedTuple):
    """A tensor's name, datatype and dims, without the batch axis if it has one."""

    name: str
    datatype: Datatype
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CallKey:
    """The parsed key of a request's frame: its input tensors, the requested outputs, and the parameters.

    ``outputs``: empty for all outputs.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    parameters: dict[str, Any]


class Request(NamedTuple):
    """A parsed request frame. ``raw`` is the whole frame, to pass it on unchanged."""

    id: bytes
    deadline_ms: int
    rows: int
    attempt: int
    flags: int
    tenant: bytes
    trace: bytes
    key: bytes
    data: list[Buffer]
    raw: Buffer


class Reply(NamedTuple):
    """A reply frame.

    FAILED has no data, and its key is JSON with ``reason`` and ``message``. END has no data and no key.
    """

    id: bytes
    status: int
    attempt: int
    seq: int
    rows: int
    wait_us: int
    compute_us: int
    shared: int
    key: bytes
    data: list[Buffer]
    claimed: bool = False


def pack(kind: int, frames: Sequence[Buffer]) -> bytes:
    """Return an envelope of ``frames``."""
    head = _ENVELOPE.pack(MAGIC, VERSION, kind, len(frames))
    sizes = struct.pack(f"<{len(frames)}I", *map(len, frames))
    return b"".join((head, sizes, *frames))


def pack_alone(kind: int, frame: list[Buffer]) -> list[Buffer]:
    """Return an envelope of one frame, as a list of pieces. No data is copied.

    The first piece is the envelope's head. The pieces of the frame follow.
    """
    return [_ENVELOPE.pack(MAGIC, VERSION, kind, 1) + struct.pack("<I", sum(map(len, frame))), *frame]


def runs(sizes: Sequence[int], most: int = 2**16) -> Iterator[tuple[int, int]]:
    """Divide frames of these ``sizes`` (in bytes) into envelopes.

    Yield one range [start, end) of positions in ``sizes`` for each envelope. An envelope has at most ``most``
    frames and ``LARGE`` bytes. A larger frame gets an envelope of its own.
    """
    start, total = 0, 0
    for at, size in enumerate(sizes):
        if at > start and (at - start >= most or total + size > LARGE):
            yield start, at
            start, total = at, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def unpack(kind: int, body: Buffer) -> list[memoryview]:
    """Return the frames of an envelope. Raises :class:`Undecodable`."""
    view = memoryview(body)
    if len(view) < _ENVELOPE.size:
        raise Undecodable(f"{len(view)} bytes, expected at least {_ENVELOPE.size} for an envelope's head")
    magic, version, found, count = _ENVELOPE.unpack_from(view)
    if magic != MAGIC or version not in READABLE:
        raise Undecodable(f"not an envelope of a known version: {bytes(view[:4])!r}")
    if found != kind:
        raise Undecodable(f"an envelope of kind {found}, expected {kind}")
    at = _ENVELOPE.size + 4 * count
    if at > len(view):
        raise Undecodable("the frame lengths are cut off")
    frames = []
    for size in struct.unpack_from(f"<{count}I", view, _ENVELOPE.size):
        frames.append(view[at : at + size])
        at += size
    if at != len(view):
        raise Undecodable(f"the envelope has {len(view)} bytes, but its frame lengths say {at}")
    return frames


def request_frame(
    id: bytes,
    deadline_ms: int,
    rows: int,
    key: bytes,
    data: list[Buffer],
    *,
    tenant: bytes = b"",
    trace: bytes = b"",
    attempt: int = 0,
    flags: int = RETRY_SAFE,
) -> bytes:
    """Return a request as a frame.

    ``data``: the raw bytes of each input, in the order of the inputs in ``key``.
    """
    head = request_head(
        id, deadline_ms, rows, key, data, tenant=tenant, trace=trace, attempt=attempt, flags=flags
    )
    return b"".join((head, *data))


def request_head(
    id: bytes,
    deadline_ms: int,
    rows: int,
    key: bytes,
    data: list[Buffer],
    *,
    tenant: bytes = b"",
    trace: bytes = b"",
    attempt: int = 0,
    flags: int = RETRY_SAFE,
) -> bytes:
    """Return the first part of a request's frame: everything before the inputs' raw bytes."""
    head = _REQUEST.pack(id, deadline_ms, rows, attempt, flags, len(tenant), len(trace), len(key), len(data))
    return b"".join((head, tenant, trace, key, struct.pack(f"<{len(data)}I", *map(len, data))))


def read_request(frame: Buffer) -> Request:
    """Parse a request frame. Raises :class:`Undecodable`."""
    try:
        id_, deadline, rows, attempt, flags, tenant, trace, key, inputs = _REQUEST.unpack_from(frame)
        at = _REQUEST.size
        tenant_, at = bytes(frame[at : at + tenant]), at + tenant
        trace_, at = bytes(frame[at : at + trace]), at + trace
        key_, at = bytes(frame[at : at + key]), at + key
        data = _buffers(frame, at, inputs)
    except struct.error as error:
        raise Undecodable(f"a request frame is cut off: {error}") from None
    return Request(id_, deadline, rows, attempt, flags, tenant_, trace_, key_, data, frame)


def with_attempt(frame: Buffer, attempt: int) -> bytes:
    """Return a copy of the request frame with this attempt number. Numbers above 255 become 255."""
    return b"".join((frame[:_ATTEMPT_AT], bytes((min(attempt, 255),)), frame[_ATTEMPT_AT + 1 :]))


def reply_frame(
    id: bytes,
    attempt: int,
    rows: int,
    key: bytes,
    data: list[Buffer],
    *,
    wait_us: int = 0,
    compute_us: int = 0,
    shared: int = 1,
    status: int = OK,
    seq: int = 0,
) -> bytes:
    """Return a reply as a frame. ``shared``: the number of requests in the model call."""
    head = _REPLY.pack(id, status, attempt, len(data), seq, rows, wait_us, compute_us, shared, len(key))
    return b"".join((head, key, struct.pack(f"<{len(data)}I", *map(len, data)), *data))


def reply_pieces(reply: Reply) -> list[Buffer]:
    """Return a large reply frame in pieces: its head, then its data. The data is not copied."""
    status = reply.status | CLAIMED if reply.claimed else reply.status
    times = reply.wait_us, reply.compute_us, reply.shared
    head = _REPLY.pack(
        reply.id, status, reply.attempt, len(reply.data), reply.seq, reply.rows, *times, len(reply.key)
    )
    return [
        b"".join((head, reply.key, struct.pack(f"<{len(reply.data)}I", *map(len, reply.data)))),
        *reply.data,
    ]


def failure_frame(id: bytes, attempt: int, reason: str, message: str) -> bytes:
    """Return a failure as a reply frame."""
    key = orjson.dumps({"reason": reason, "message": message[:LARGE]})
    return _REPLY.pack(id, FAILED, attempt, 0, 0, 0, 0, 0, 1, len(key)) + key


def end_frame(id: bytes, attempt: int, chunks: int) -> bytes:
    """Return the END frame of a stream with ``chunks`` chunks."""
    return _REPLY.pack(id, END, attempt, 0, chunks, 0, 0, 0, 1, 0)


def read_reply(frame: Buffer) -> Reply:
    """Parse a reply frame. Raises :class:`Undecodable`."""
    try:
        id_, status, attempt, outputs, seq, rows, wait, compute, shared, key = _REPLY.unpack_from(frame)
        at = _REPLY.size
        key_, at = bytes(frame[at : at + key]), at + key
        data = _buffers(frame, at, outputs)
    except struct.error as error:
        raise Undecodable(f"a reply frame is cut off: {error}") from None
    claimed = bool(status & CLAIMED)
    return Reply(id_, status & ~CLAIMED, attempt, seq, rows, wait, compute, shared, key_, data, claimed)


def _buffers(frame: Buffer, at: int, count: int) -> list[Buffer]:
    sizes = struct.unpack_from(f"<{count}I", frame, at)
    at += 4 * count
    found: list[Buffer] = []
    for size in sizes:
        found.append(frame[at : at + size])
        at += size
    if at != len(frame):
        raise Undecodable(f"a frame has {len(frame)} bytes, but its lengths say {at}")
    return found


def call_key(inputs: tuple[Tensor, ...], outputs: tuple[str, ...], parameters: dict[str, Any]) -> bytes:
    """Return the key of a request."""
    parts = [struct.pack("<H", len(outputs))]
    parts += [_name(name) for name in outputs]
    extra = orjson.dumps(parameters, option=orjson.OPT_SORT_KEYS) if parameters else b""
    return b"".join((_tensors(inputs), *parts, extra))


def read_call_key(key: bytes) -> CallKey:
    """Parse a request's key. Raises :class:`Undecodable`."""
    return _kept_call_key(key) if len(key) <= KEPT_KEY else _parse_call_key(key)


def _parse_call_key(key: bytes) -> CallKey:
    try:
        inputs, at = _read_tensors(key)
        (count,) = struct.unpack_from("<H", key, at)
        at += 2
        outputs = []
        for _ in range(count):
            name, at = _read_name(key, at)
            outputs.append(name)
        return CallKey(inputs, tuple(outputs), _object(key[at:]))
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise Undecodable(f"a request's key cannot be read: {error}") from None


_kept_call_key = lru_cache(maxsize=_KEYS_KEPT)(_parse_call_key)


def result_key(outputs: tuple[Tensor, ...], parameters: dict[str, Any] | None = None) -> bytes:
    """Return the key of a successful reply. It describes the outputs and has the answer's parameters."""
    extra = orjson.dumps(parameters, option=orjson.OPT_SORT_KEYS) if parameters else b""
    return _tensors(outputs) + extra


def read_result_key(key: bytes) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Parse a successful reply's key. Raises :class:`Undecodable`."""
    return _kept_result_key(key) if len(key) <= KEPT_KEY else _parse_result_key(key)


def _parse_result_key(key: bytes) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    try:
        outputs, at = _read_tensors(key)
        return outputs, _object(key[at:])
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise Undecodable(f"a reply's key cannot be read: {error}") from None


_kept_result_key = lru_cache(maxsize=_KEYS_KEPT)(_parse_result_key)


def _tensors(tensors: tuple[Tensor, ...]) -> bytes:
    parts = [struct.pack("<H", len(tensors))]
    for tensor in tensors:
        dims = tensor.dims
        parts += (_name(tensor.name), struct.pack(f"<BB{len(dims)}q", tensor.datatype.code, len(dims), *dims))
    return b"".join(parts)


def _read_tensors(key: bytes) -> tuple[tuple[Tensor, ...], int]:
    (count,) = struct.unpack_from("<H", key)
    at, found = 2, []
    for _ in range(count):
        name, at = _read_name(key, at)
        code, ndim = key[at], key[at + 1]
        dims = struct.unpack_from(f"<{ndim}q", key, at + 2)
        at += 2 + 8 * ndim
        found.append(Tensor(name, BY_CODE[code], dims))
    return tuple(found), at


def _object(raw: bytes) -> dict[str, Any]:
    found = orjson.loads(raw) if raw else {}
    if not isinstance(found, dict):
        raise ValueError("the parameters are not a JSON object")
    return found


def _name(name: str) -> bytes:
    raw = name.encode()
    return bytes((len(raw),)) + raw


def _read_name(key: bytes, at: int) -> tuple[str, int]:
    size = key[at]
    raw = key[at + 1 : at + 1 + size]
    if len(raw) != size:
        raise ValueError("a name is cut off")
    return raw.decode(), at + 1 + size


def tensor(name: str, datatype: str, dims: tuple[int, ...]) -> Tensor:
    """Return a :class:`Tensor`. Raise KeyError if ``datatype`` is not the name of a known datatype."""
    return Tensor(name, DATATYPES[datatype], dims)
