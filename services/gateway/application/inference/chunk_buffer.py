"""Buffer the replies of a stream until its caller reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable

from services.gateway.adapters.pending_requests import ReplyOrError
from tidegate.kernel.errors import Overloaded, TidegateError
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply

MAX_CHUNKS = 1000
MAX_BYTES = 8 * 2**20


class ChunkBuffer:
    """A queue of one stream's replies, bounded by ``MAX_CHUNKS`` and ``MAX_BYTES``.

    If the caller reads so slowly that the queue is full, ``overflow`` is called once and must cancel the
    stream. The caller then reads the queued replies and an error.
    """

    def __init__(self, overflow: Callable[[], None]) -> None:
        self._overflow = overflow
        self._waiting: deque[ReplyOrError] = deque()
        self._bytes = 0
        self._more = asyncio.Event()
        self._closed = False

    def put(self, outcome: ReplyOrError) -> None:
        """Add the next chunk, the end of the stream, or the error that ended it."""
        if self._closed:
            return
        size = _size(outcome)
        if self._waiting and (len(self._waiting) >= MAX_CHUNKS or self._bytes + size > MAX_BYTES):
            self._closed = True
            self._overflow()
            outcome, size = _too_slow(), 0
        self._closed |= isinstance(outcome, TidegateError) or outcome.status != envelope.CHUNK
        self._bytes += size
        self._waiting.append(outcome)
        self._more.set()

    async def read(self) -> AsyncGenerator[Reply]:
        """Yield the replies that contain an answer or a failure. If an error ended the stream, raise it."""
        while True:
            while not self._waiting:
                self._more.clear()
                await self._more.wait()
            outcome = self._waiting.popleft()
            self._bytes -= _size(outcome)
            if isinstance(outcome, TidegateError):
                raise outcome
            if outcome.status == envelope.END:
                return
            yield outcome
            if outcome.status != envelope.CHUNK:
                return


def _size(outcome: ReplyOrError) -> int:
    return 0 if isinstance(outcome, TidegateError) else sum(map(len, outcome.data))


def _too_slow() -> TidegateError:
    return Overloaded(
        f"the stream was cancelled, because the caller reads too slowly: {MAX_CHUNKS} answers or "
        f"{MAX_BYTES} bytes wait to be read",
        reason="slow_reader",
    )
