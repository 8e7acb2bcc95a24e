"""Bodies with ``Content-Encoding`` gzip or deflate, unpacked in pieces of bounded size."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from services.gateway.api.body_limits import STEP, Body, BodyLimits, Headers
from services.gateway.domain import oip
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.envelope import Buffer

_WBITS = {"gzip": 31, "deflate": 15}
_PLAIN = {"", "identity"}
# zlib copies what it has not used of its input at each call, so it gets little at once.
_FED = 64 * 1024
# An empty member has 8 or 20 bytes and costs as much as many do: so many, and one more for each KiB.
MEMBERS, BYTES_A_MEMBER = 1024, 1024
_HEADER_LENGTH = oip.HEADER_LENGTH.lower().encode()


class Decompressor:
    """Unpacks one body, or another thing that is called ``what`` in errors.

    ``encoding`` is gzip or deflate; BadRequest for any other.
    """

    def __init__(self, encoding: str, what: str = "body") -> None:
        if encoding not in _WBITS:
            raise BadRequest(f"Content-Encoding {encoding[:40]!r} is not supported: use gzip or deflate")
        self._encoding = encoding
        self._what = what
        self._unpacker = zlib.decompressobj(_WBITS[encoding])
        self._members_left = MEMBERS

    def feed(self, packed: Buffer) -> Iterator[bytes]:
        """Yield the unpacked bytes, in pieces of at most ``STEP`` bytes; raises BadRequest."""
        for at in range(0, len(packed), _FED):
            rest = bytes(packed[at : at + _FED])
            self._members_left += -(-len(rest) // BYTES_A_MEMBER)
            try:
                while rest:
                    if self._unpacker.eof:
                        # Another member, or zeros behind the last. A finished one keeps all it is given.
                        rest = rest.lstrip(b"\0")
                        if rest:
                            self._next_member()
                        continue
                    yield self._unpacker.decompress(rest, STEP)
                    rest = self._unpacker.unconsumed_tail or self._unpacker.unused_data
            except zlib.error as error:
                raise BadRequest(f"the {self._what} is not {self._encoding}: {error}") from None

    def _next_member(self) -> None:
        self._members_left -= 1
        if self._members_left < 0:
            raise BadRequest(
                f"the {self._what} has too many {self._encoding} members for its size: compress it as one"
            )
        self._unpacker = zlib.decompressobj(_WBITS[self._encoding])

    def end(self) -> None:
        """Raise BadRequest unless it is complete."""
        if not self._unpacker.eof:
            raise BadRequest(f"the {self._what}'s {self._encoding} data is cut off")


def encoding_of(headers: Headers) -> str:
    """The ``Content-Encoding``; empty for a plain body."""
    found = headers.get(b"content-encoding", b"").decode("latin-1").lower()
    return "" if found in _PLAIN else found


def inflated(packed: Buffer, headers: Headers, limits: BodyLimits, *, known: bool = False) -> Body | None:
    """The unpacked body, counted against the budget while it grows; None: it is not packed.

    ``known``: its caller has shown a good credential.
    Raises BadRequest, PayloadTooLarge or Overloaded.
    """
    encoding = encoding_of(headers)
    if not encoding:
        return None
    inflater, body = Decompressor(encoding), Body(limits, known=known)
    # Without binary data behind it all of it is JSON, which has a lower limit.
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
