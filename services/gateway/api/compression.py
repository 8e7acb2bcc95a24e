"""Compressed answers, for callers that want them."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from services.gateway.api.body_limits import Headers
from tidegate.kernel.protocol.envelope import Buffer

# Below this the header costs more than is saved; above that it is done beside the event loop.
WORTH_BYTES = 1024
BESIDE_BYTES = 64 * 1024
_CODINGS = {b"gzip": 31, b"deflate": 15}  # zlib's wbits


class HttpResponse(NamedTuple):
    """What goes back: status, headers (names in lower case), body, and tensors behind it as they are."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    tail: Sequence[Buffer] = ()


def deliver(response: HttpResponse, headers: Headers, done: Callable[[HttpResponse], None]) -> None:
    """Hand the response on, compressed if the caller of these headers wants that."""
    size = len(response.body) + sum(map(len, response.tail))
    coding = wanted(headers.get(b"accept-encoding", b""), binary=bool(response.tail))
    if coding is None or size < WORTH_BYTES:
        done(response)
    elif size < BESIDE_BYTES:
        done(compressed(response, coding))
    else:
        loop = asyncio.get_running_loop()
        task = loop.run_in_executor(None, compressed, response, coding)
        task.add_done_callback(lambda finished: done(finished.result()))


def wanted(accepted: bytes, *, binary: bool) -> bytes | None:
    """The coding to use for this ``Accept-Encoding``: gzip, deflate or none.

    Many clients list codings whatever they ask for; tensors in binary hardly shrink, so they are compressed
    only for those that name one coding, as Triton's clients do when told to.
    """
    if accepted in _CODINGS:
        return accepted
    if binary or not accepted:
        return None
    best, found = 0.0, None
    for part in accepted.lower().split(b","):
        name, _, quality = part.strip().partition(b";q=")
        try:
            weight = float(quality or 1)
        except ValueError:
            weight = 0.0
        if name in _CODINGS and weight > best:
            best, found = weight, name
    return found


def compressed(response: HttpResponse, coding: bytes) -> HttpResponse:
    """The response in that coding."""
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
