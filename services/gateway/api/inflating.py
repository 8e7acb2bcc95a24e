"""Bodies with ``Content-Encoding`` gzip or deflate, unpacked in pieces of bounded size."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from services.gateway.api.limits import STEP, Body, Headers, Limits
from tidegate.errors import BadRequest
from tidegate.protocol import oip
from tidegate.protocol.envelope import Buffer

_WBITS = {"gzip": 31, "deflate": 15}
_PLAIN = {"", "identity"}
# zlib copies what it has not used of its input at each call, so it gets little at once.
_FED = 64 * 1024
_HEADER_LENGTH = oip.HEADER_LENGTH.lower().encode()


class Inflater:
    """Unpacks one body. ``encoding`` is gzip or deflate; BadRequest for any other."""

    def __init__(self, encoding: str) -> None:
        if encoding not in _WBITS:
            raise BadRequest(f"Content-Encoding {encoding[:40]!r} is not supported: use gzip or deflate")
        self._encoding = encoding
        self._unpacker = zlib.decompressobj(_WBITS[encoding])

    def feed(self, packed: Buffer) -> Iterator[bytes]:
        """What these bytes unpack to, in pieces of at most ``STEP`` bytes; raises BadRequest."""
        for at in range(0, len(packed), _FED):
            rest = bytes(packed[at : at + _FED])
            try:
                while rest:
                    if self._unpacker.eof:
                        # Another member, or zeros behind the last. A finished one keeps all it is given.
                        rest = rest.lstrip(b"\0")
                        if rest:
                            self._unpacker = zlib.decompressobj(_WBITS[self._encoding])
                        continue
                    yield self._unpacker.decompress(rest, STEP)
                    rest = self._unpacker.unconsumed_tail or self._unpacker.unused_data
            except zlib.error as error:
                raise BadRequest(f"the body is not {self._encoding}: {error}") from None

    def end(self) -> None:
        """Raise BadRequest unless the body is complete."""
        if not self._unpacker.eof:
            raise BadRequest(f"the body's {self._encoding} data is cut off")


def encoding_of(headers: Headers) -> str:
    """The ``Content-Encoding``; empty for a plain body."""
    found = headers.get(b"content-encoding", b"").decode("latin-1").lower()
    return "" if found in _PLAIN else found


def inflated(packed: Buffer, headers: Headers, limits: Limits, *, known: bool = False) -> Body | None:
    """The unpacked body, counted against the budget while it grows; None: it is not packed.

    ``known``: its caller has shown a good credential.
    Raises BadRequest, PayloadTooLarge or Overloaded.
    """
    encoding = encoding_of(headers)
    if not encoding:
        return None
    inflater, body = Inflater(encoding), Body(limits, known=known)
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
