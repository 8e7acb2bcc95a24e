"""Calls of light models meet before they are queued.

A gRPC client sends its calls one at a time, so each would travel alone, and cost the broker and
the worker as much as a whole envelope. A call that comes while others of its model are out waits until one of
them is answered, 2 ms at most: what has come by then leaves together. A call to a heavy model, or one of few,
does not wait; neither does anything over HTTP, where calls come together by themselves.
"""

from __future__ import annotations

import asyncio

HOLD_S = 0.002
FEW = 4
LIGHT_US = 2_500


class MicroBatcher:
    """The calls of one model in this process; one that waits does so for ``hold_s`` seconds at most."""

    __slots__ = ("_hold_s", "_light", "_out", "_timer", "_waiting")

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self._hold_s = hold_s
        self._out = 0
        self._light = False
        self._waiting: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def join(self) -> None:
        """Wait for company if that pays; from then on the call is out, until :meth:`leave`."""
        if self._light and self._out >= FEW:
            loop = asyncio.get_running_loop()
            mine = loop.create_future()
            self._waiting.append(mine)
            if self._timer is None:
                self._timer = loop.call_later(self._hold_s, self._go)
            await mine
        self._out += 1

    def learn(self, compute_us: int, shared: int) -> None:
        """A model call of ``shared`` requests took so long."""
        self._light = compute_us <= LIGHT_US * shared

    def leave(self) -> None:
        """A call is over: those that wait go."""
        self._out -= 1
        if self._waiting:
            self._go()

    def _go(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for each in waiting:
            if not each.done():
                each.set_result(None)
