"""The head of a call: its header block, decoded and understood once for each distinct block."""

from __future__ import annotations

import re
from typing import NamedTuple

from hpack import Decoder, HPACKError

from services.gateway.api.grpc.frames import ErrorCode, ProtocolError

# Bytes of a block as it comes, bytes of its fields (each counts 32 more, by RFC 7541), and their number.
BLOCK_BYTES = 16 * 1024
LIST_BYTES = 32 * 1024
FIELDS = 100
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# A client repeats most blocks byte for byte, so what they mean is kept: so many, each up to this size.
_KEPT = 512
_KEPT_BYTES = 4096


class CallHeaders(NamedTuple):
    """What a call's header fields say. ``problem``: the HTTP status of what is no gRPC call at all, or 0."""

    path: str = ""
    rid: str = ""
    asked_ms: bytes | None = None
    timeout_s: float | None = None
    credential: dict[bytes, bytes] = {}  # noqa: RUF012  never written to
    encoding: bytes = b"identity"
    problem: int = 0


class HeaderBlockReader:
    """Reads the header blocks of one connection."""

    def __init__(self, kept: dict[bytes, CallHeaders]) -> None:
        """``kept``: shared by all connections, since the blocks in it need no table."""
        self._decoder = Decoder(max_header_list_size=LIST_BYTES)
        self._kept = kept

    def read(self, block: bytes) -> CallHeaders:
        """Return the head of a call, or trailers (of which nothing is used); raises Broken."""
        # With a table of size 0, which our settings ask for, a block means the same wherever it comes.
        stateless = self._decoder.header_table_size == 0
        if stateless and (found := self._kept.get(block)) is not None:
            return found
        try:
            fields = self._decoder.decode(block, raw=True)
        except (HPACKError, IndexError, ValueError) as error:
            raise ProtocolError(ErrorCode.COMPRESSION_ERROR, f"unreadable header block: {error}") from None
        head = _understood([(bytes(name), bytes(value)) for name, value in fields])
        if stateless and self._decoder.header_table_size == 0 and len(block) <= _KEPT_BYTES:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[block] = head
        return head


def _understood(fields: list[tuple[bytes, bytes]]) -> CallHeaders:
    if len(fields) > FIELDS:
        raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, f"more than {FIELDS} header fields")
    found: dict[bytes, bytes] = {}
    for name, value in fields:
        if name in found and name in {b":path", b":method", b"authorization", b"content-type"}:
            return CallHeaders(problem=400)
        found[name] = value
    if found.get(b":method") != b"POST":
        return CallHeaders(problem=405)
    # No page in a browser can send this content type to another origin without asking first.
    if not found.get(b"content-type", b"").startswith(b"application/grpc"):
        return CallHeaders(problem=415)
    timeout = found.get(b"grpc-timeout")
    match = _TIMEOUT.fullmatch(timeout) if timeout is not None else None
    if timeout is not None and match is None:
        return CallHeaders(problem=400)
    credential, rid = found.get(b"authorization"), found.get(b"x-request-id", b"")
    return CallHeaders(
        path=found.get(b":path", b"").decode("latin-1"),
        rid=rid[:128].decode() if rid.isascii() and rid.decode().isprintable() else "",
        asked_ms=found.get(b"x-request-timeout-ms") or None,
        timeout_s=int(match[1]) * _UNIT_S[match[2]] if match else None,
        credential={} if credential is None else {b"authorization": credential},
        encoding=found.get(b"grpc-encoding", b"identity"),
    )
