"""Responses that are made while their caller is there: streams of server-sent events."""

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
    """A response that is made while its caller is there; when he hangs up, what makes it is cancelled."""

    def __init__(self, make: Callable[[Send], Awaitable[None]], end: Callable[[], None]) -> None:
        super().__init__()
        self._make = make
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises what ``make`` raised."""
        making = asyncio.ensure_future(self._make(send))
        gone = asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait({making, gone}, return_when=asyncio.FIRST_COMPLETED)
            if making.done():
                making.result()
        finally:
            await tasks.end(making, gone)
            self._end()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
