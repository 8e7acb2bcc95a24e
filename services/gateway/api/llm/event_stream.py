"""Write a response of server-sent events, with comments so that its client does not time out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Send

from services.gateway.api.cancellable_response import EVENT_STREAM
from tidegate.kernel import tasks

# The headers are sent with the first event, or after FIRST_WAIT_S. An error before the headers still gets its
# own status code.
FIRST_WAIT_S = 2.0
KEEP_ALIVE_S = 5.0
KEEP_ALIVE = b": keep-alive\n\n"

RawHeaders = list[tuple[bytes, bytes]]


class EventStream:
    """A response of server-sent events, with comments while no event comes.

    The headers are sent with the first event, or with the first comment after ``FIRST_WAIT_S``. ``headers``
    returns additional headers. ``comment`` returns the comment to send while no event comes. ``content``: the
    headers that describe the body, such as its content type.
    """

    def __init__(
        self,
        send: Send,
        headers: Callable[[], RawHeaders] = list,
        comment: Callable[[], bytes] = lambda: KEEP_ALIVE,
        content: RawHeaders = EVENT_STREAM,
    ) -> None:
        self._send = send
        self._headers = headers
        self._comment = comment
        self._content = content
        self._begin = asyncio.Lock()
        self._recent = False
        self._writing = False
        self._ticker: asyncio.Task[None] | None = None
        self.started = False

    async def __aenter__(self) -> EventStream:
        """Begin to send comments."""
        self._ticker = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop sending comments."""
        await tasks.end(self._ticker)

    async def write(self, data: bytes) -> None:
        """Send ``data``: one or more encoded events."""
        if not self.started:
            await self._start()
        self._recent = self._writing = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._writing = False

    async def end(self, data: bytes = b"") -> None:
        """Send the last events, and end the response."""
        await tasks.end(self._ticker)
        if not self.started:
            await self._start()
        await self._send({"type": "http.response.body", "body": data})

    async def _start(self) -> None:
        async with self._begin:
            if not self.started:
                headers = [*self._content, *self._headers()]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                self.started = True

    async def _keep_alive(self) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = KEEP_ALIVE_S
            if not (self._recent or self._writing):
                await self.write(self._comment())
            self._recent = False
