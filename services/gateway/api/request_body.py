"""Receive the whole body of a request within the limits of size and memory."""

from __future__ import annotations

import time
from typing import NamedTuple

from fastapi import Request
from starlette.requests import ClientDisconnect

from services.gateway.api.body_limits import Body, BodyLimits, Headers
from services.gateway.api.decompression import inflated
from tidegate.kernel.errors import BadRequest, PayloadTooLarge
from tidegate.kernel.protocol.access import ANONYMOUS
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.service import caller

SMALL_BODY = 65_536


class ReceivedBody(NamedTuple):
    """The body of a request. It counts against the memory budget until ``held`` is released.

    ``started``: the time (``time.perf_counter``) at which the body was complete.
    """

    body: Buffer
    held: Body
    started: float


async def receive_body(request: Request, limits: BodyLimits) -> ReceivedBody:
    """Return the body of a request, decompressed if needed. Raise a TidegateError if it is refused."""
    headers: Headers = dict(request.scope["headers"])
    known = caller.current.get().principal is not ANONYMOUS
    held = Body(limits, known=known)
    try:
        if (refusal := limits.check_headers(headers, known=known)) is not None:
            raise refusal
        async for chunk in request.stream():
            if (refusal := held.add(chunk)) is not None:
                raise refusal
        started = time.perf_counter()
        body = held.whole()
        if (unpacked := inflated(body, headers, limits, known=known)) is not None:
            held.release()
            held, body = unpacked, unpacked.whole()
        limits.check_json(len(body))
    except ClientDisconnect:
        held.release()
        raise BadRequest("the caller closed the connection before the request was complete") from None
    except BaseException:
        held.release()
        raise
    return ReceivedBody(body, held, started)


async def small_body(request: Request) -> bytes:
    """Return a body of at most 64 KiB; raise PayloadTooLarge if it is larger.

    Its content type is ignored, as in Triton.
    """
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > SMALL_BODY:
                raise PayloadTooLarge(f"the body is larger than the limit of {SMALL_BODY} bytes")
    except ClientDisconnect:
        raise BadRequest("the caller closed the connection before the request was complete") from None
    return body
