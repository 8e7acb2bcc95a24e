"""A streaming response that is cancelled if its caller closes the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import Response
from starlette.types import Receive, Scope, Send

from tidegate.kernel import tasks

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class CancellableResponse(Response):
    """A response that ``make`` writes. If the caller closes the connection, ``make`` is cancelled.

    ``end``: called last, in every case.
    """

    def __init__(self, make: Callable[[Send], Awaitable[None]], end: Callable[[], None]) -> None:
        super().__init__()
        self._make = make
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response over ASGI. Raise the exception of ``make``, if it fails. Call ``end`` last."""
        response = asyncio.ensure_future(self._make(send))
        hang_up = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({response, hang_up}, return_when=asyncio.FIRST_COMPLETED)
            if response.done():
                response.result()
        finally:
            await tasks.end(response, hang_up)
            self._end()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
