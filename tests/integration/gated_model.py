"""A small model for workers without Triton, whose calls a test can delay or let fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tidegate.kernel.protocol.envelope import Request


class GatedModel:
    """``open`` lets calls pass; ``fail`` may raise for a call; ``calls`` has the request ids of each call."""

    decoupled = False

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.fail: Callable[[list[Request]], None] = lambda _: None
        self.calls: list[list[bytes]] = []
        self.cancelled = 0

    async def gate(self, requests: list[Request], timeout_s: float) -> None:
        """Record a call, wait until it may pass, and raise if it is to fail."""
        assert timeout_s > 0
        self.calls.append([request.id for request in requests])
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.fail(requests)
