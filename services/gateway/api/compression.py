"""Compress responses for callers that accept it."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from services.gateway.api.body_limits import Headers
from tidegate.kernel.protocol.envelope import Buffer

# Responses of fewer bytes are not compressed: compression would save less than the extra headers cost.
MIN_BYTES = 1024
# Larger responses are compressed in a thread, so that they do not block the event loop.
THREAD_BYTES = 64 * 1024
_CODINGS = {b"gzip": 31, b"deflate": 15}  # the value is zlib's parameter `wbits`


class HttpResponse(NamedTuple):
    """A response: status, headers (names in lower case), body, and raw tensors to send after the body."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    tail: Sequence[Buffer] = ()


def deliver(response: HttpResponse, headers: Headers, done: Callable[[HttpResponse], None]) -> None:
    """Pass the response to ``done``, compressed if the request's headers accept that."""
    size = len(response.body) + sum(map(len, response.tail))
    coding = choose_coding(headers.get(b"accept-encoding", b""), binary=bool(response.tail))
    if coding is None or size < MIN_BYTES:
        done(response)
    elif size < THREAD_BYTES:
        done(compressed(response, coding))
    else:
        loop = asyncio.get_running_loop()
        task = loop.run_in_executor(None, compressed, response, coding)
        task.add_done_callback(lambda finished: done(finished.result()))


def choose_coding(accepted: bytes, *, binary: bool) -> bytes | None:
    """Return the coding to use for this ``Accept-Encoding``: gzip, deflate or None.

    Many clients list several codings by default, and binary tensors hardly shrink. So a binary response is
    compressed only if the header names exactly one coding. Triton's clients name exactly one if their
    user wants compression.
    """
    if accepted in _CODINGS:
        return accepted
    if binary or not accepted:
        return None
    best, coding = 0.0, None
    for part in accepted.lower().split(b","):
        name, _, quality = part.strip().partition(b";q=")
        try:
            weight = float(quality or 1)
        except ValueError:
            weight = 0.0
        if name in _CODINGS and weight > best:
            best, coding = weight, name
    return coding


def compressed(response: HttpResponse, coding: bytes) -> HttpResponse:
    """Return the response compressed with ``coding``."""
    packer = zlib.compressobj(level=1, wbits=_CODINGS[coding])
    pieces = [packer.compress(piece) for piece in (response.body, *response.tail)]
    body = b"".join((*pieces, packer.flush()))
    headers = [(name, value) for name, value in response.headers if name != b"content-length"]
    headers += [
        (b"content-length", b"%d" % len(body)),
        (b"content-encoding", coding),
        (b"vary", b"accept-encoding"),
    ]
    return HttpResponse(response.status, headers, body)
