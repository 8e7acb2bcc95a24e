"""A model in miniature, for workers without Triton: a test holds its calls up, or lets them fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tidegate.kernel.protocol.envelope import Request


class GatedModel:
    """``open`` lets calls through; ``fail`` may raise for a call; ``calls`` are the ids of each call."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.fail: Callable[[list[Request]], None] = lambda _: None
        self.calls: list[list[bytes]] = []
        self.cancelled = 0

    async def gate(self, requests: list[Request], timeout_s: float) -> None:
        """A call begins: it is noted, waits until it is let through, and fails if it is to."""
        assert timeout_s > 0
        self.calls.append([request.id for request in requests])
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.fail(requests)
