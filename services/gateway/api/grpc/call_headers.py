"""Read the headers of a call. Each distinct header block is decoded and checked once."""

from __future__ import annotations

import re
from typing import NamedTuple

from hpack import Decoder, HPACKError

from services.gateway.api.grpc.frames import ErrorCode, ProtocolError

# The limits of a header block. BLOCK_BYTES: the encoded bytes. LIST_BYTES: the decoded bytes, plus 32 for
# each field, as in RFC 7541. FIELDS: the number of fields.
BLOCK_BYTES = 16 * 1024
LIST_BYTES = 32 * 1024
FIELDS = 100
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# Clients repeat most blocks byte for byte, so decoded blocks are cached: at most _CACHED blocks, and only
# blocks of at most _CACHED_BYTES.
_CACHED = 512
_CACHED_BYTES = 4096


class CallHeaders(NamedTuple):
    """The headers of a call. ``problem``: the HTTP status if this is not a gRPC call, else 0."""

    path: str = ""
    rid: str = ""
    request_timeout_ms: bytes | None = None
    timeout_s: float | None = None
    credential: dict[bytes, bytes] = {}  # noqa: RUF012  never written to
    encoding: bytes = b"identity"
    problem: int = 0
    fields: dict[bytes, bytes] = {}  # noqa: RUF012  never written to


class HeaderBlockReader:
    """A reader of the header blocks of one connection."""

    def __init__(self, cache: dict[bytes, CallHeaders]) -> None:
        """``cache``: the decoded headers of each block, under the block's bytes.

        All connections may share it.
        """
        self._decoder = Decoder(max_header_list_size=LIST_BYTES)
        self._cache = cache

    def read(self, block: bytes) -> CallHeaders:
        """Decode a header block: either the headers of a call, or its trailers.

        Raise ProtocolError if the block cannot be decoded or has too many fields.
        """
        # The server requests a dynamic table of size 0. With this size, a block means the same on every
        # connection, so the cache can be used. Until the client has set the size, the cache is not used.
        stateless = self._decoder.header_table_size == 0
        if stateless and (cached := self._cache.get(block)) is not None:
            return cached
        try:
            fields = self._decoder.decode(block, raw=True)
        except (HPACKError, IndexError, ValueError) as error:
            raise ProtocolError(ErrorCode.COMPRESSION_ERROR, f"unreadable header block: {error}") from None
        head = _parsed([(bytes(name), bytes(value)) for name, value in fields])
        if stateless and self._decoder.header_table_size == 0 and len(block) <= _CACHED_BYTES:
            if len(self._cache) >= _CACHED:
                self._cache.clear()
            self._cache[block] = head
        return head


def _parsed(fields: list[tuple[bytes, bytes]]) -> CallHeaders:
    if len(fields) > FIELDS:
        raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, f"the call has more than {FIELDS} header fields")
    headers: dict[bytes, bytes] = {}
    for name, value in fields:
        if name in headers and name in {b":path", b":method", b"authorization", b"content-type"}:
            return CallHeaders(problem=400)
        headers[name] = value
    if headers.get(b":method") != b"POST":
        return CallHeaders(problem=405)
    # Accept only gRPC's content type. A web page of another origin can send this type only after a preflight
    # request, and this server refuses preflight requests.
    if not headers.get(b"content-type", b"").startswith(b"application/grpc"):
        return CallHeaders(problem=415)
    timeout = headers.get(b"grpc-timeout")
    match = _TIMEOUT.fullmatch(timeout) if timeout is not None else None
    if timeout is not None and match is None:
        return CallHeaders(problem=400)
    credential, rid = headers.get(b"authorization"), headers.get(b"x-request-id", b"")
    return CallHeaders(
        path=headers.get(b":path", b"").decode("latin-1"),
        rid=rid[:128].decode() if rid.isascii() and rid.decode().isprintable() else "",
        request_timeout_ms=headers.get(b"x-request-timeout-ms") or None,
        timeout_s=int(match[1]) * _UNIT_S[match[2]] if match else None,
        credential={} if credential is None else {b"authorization": credential},
        encoding=headers.get(b"grpc-encoding", b"identity"),
        fields=headers,
    )
