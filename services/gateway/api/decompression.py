"""Decompress bodies with ``Content-Encoding`` gzip or deflate, in pieces of bounded size."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from services.gateway.api.body_limits import STEP, Body, BodyLimits, Headers
from services.gateway.domain import oip
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.envelope import Buffer

_WBITS = {"gzip": 31, "deflate": 15}
_PLAIN = {"", "identity"}
# At each call, zlib copies the input that it has not used yet. So each call gets at most this many bytes.
_INPUT_BYTES = 64 * 1024
# Compressed data can consist of several members. Even an empty member of 8 or 20 bytes takes much time. So a
# body may have MEMBERS members, plus one for each BYTES_PER_MEMBER bytes.
MEMBERS, BYTES_PER_MEMBER = 1024, 1024
_HEADER_LENGTH = oip.HEADER_LENGTH.lower().encode()


class Decompressor:
    """A decompressor of one body. ``what``: the word for the data in error messages."""

    def __init__(self, encoding: str, what: str = "body") -> None:
        """``encoding``: gzip or deflate. Raise BadRequest for any other encoding."""
        if encoding not in _WBITS:
            raise BadRequest(f"Content-Encoding {encoding[:40]!r} is not supported: use gzip or deflate")
        self._encoding = encoding
        self._what = what
        self._unpacker = zlib.decompressobj(_WBITS[encoding])
        self._members_left = MEMBERS

    def feed(self, packed: Buffer) -> Iterator[bytes]:
        """Yield the decompressed bytes in pieces of at most ``STEP`` bytes.

        Raise BadRequest if the data is invalid or has too many members.
        """
        for at in range(0, len(packed), _INPUT_BYTES):
            rest = bytes(packed[at : at + _INPUT_BYTES])
            self._members_left += -(-len(rest) // BYTES_PER_MEMBER)
            try:
                while rest:
                    if self._unpacker.eof:
                        # After the end of a member, another member or zero bytes may follow.
                        rest = rest.lstrip(b"\0")
                        if rest:
                            self._next_member()
                        continue
                    yield self._unpacker.decompress(rest, STEP)
                    rest = self._unpacker.unconsumed_tail or self._unpacker.unused_data
            except zlib.error as error:
                raise BadRequest(f"the {self._what} is not valid {self._encoding}: {error}") from None

    def _next_member(self) -> None:
        self._members_left -= 1
        if self._members_left < 0:
            raise BadRequest(
                f"the {self._what} has too many {self._encoding} members for its size: use one member"
            )
        self._unpacker = zlib.decompressobj(_WBITS[self._encoding])

    def end(self) -> None:
        """Raise BadRequest if the data is incomplete."""
        if not self._unpacker.eof:
            raise BadRequest(f"the {self._what}'s {self._encoding} data is incomplete")


def encoding_of(headers: Headers) -> str:
    """Return the ``Content-Encoding``, or an empty string for a body that is not compressed."""
    encoding = headers.get(b"content-encoding", b"").decode("latin-1").lower()
    return "" if encoding in _PLAIN else encoding


def inflated(packed: Buffer, headers: Headers, limits: BodyLimits, *, known: bool = False) -> Body | None:
    """Return the decompressed body, or None if ``packed`` is not compressed.

    The memory budget counts the body as it grows. ``known``: True if the caller has sent a valid credential.

    Raise BadRequest if ``packed`` is invalid. Raise PayloadTooLarge if the body is larger than its limit.
    Raise Overloaded if the memory budget is full.
    """
    encoding = encoding_of(headers)
    if not encoding:
        return None
    inflater, body = Decompressor(encoding), Body(limits, known=known)
    # Without Inference-Header-Content-Length, the whole body is JSON, which has a lower limit.
    only_json = _HEADER_LENGTH not in headers
    try:
        for piece in inflater.feed(packed):
            if (refusal := body.add(piece)) is not None:
                raise refusal
            if only_json:
                limits.check_json(len(body))
        inflater.end()
    except BaseException:
        body.release()
        raise
    return body
