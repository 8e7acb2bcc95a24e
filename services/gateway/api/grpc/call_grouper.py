"""Group gRPC calls to fast models, so that they share an envelope.

A gRPC client sends its calls one at a time. A call in its own envelope would cost the broker and the worker
as much as a full envelope. So a new call waits if several calls to the same model are in flight. The wait
ends when one of the calls in flight is answered, or after 2 ms. Then all waiting calls are sent together. A
call to a slow model does not wait. HTTP calls arrive in groups, so they need no grouper.

A grouper does not keep the order of the calls: a call that does not wait overtakes the waiting ones.
"""

from __future__ import annotations

import asyncio

HOLD_S = 0.002
MIN_IN_FLIGHT = 4
LIGHT_US = 2_500


class CallGrouper:
    """A grouper of the calls to one model in this process. A call waits for at most ``hold_s`` seconds."""

    __slots__ = ("_hold_s", "_in_flight", "_light", "_timer", "_waiting")

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self._hold_s = hold_s
        self._in_flight = 0
        self._light = False
        self._waiting: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def join(self) -> None:
        """Wait, if the model is fast and busy. Then count this call as in flight.

        The wait ends when a call in flight is answered, or after ``hold_s`` seconds.
        """
        if self._light and self._in_flight >= MIN_IN_FLIGHT:
            loop = asyncio.get_running_loop()
            turn = loop.create_future()
            self._waiting.append(turn)
            if self._timer is None:
                self._timer = loop.call_later(self._hold_s, self._release)
            await turn
        self._in_flight += 1

    def learn(self, compute_us: int, shared: int) -> None:
        """Record whether the model is fast.

        ``compute_us``: the microseconds that the model took for a call with ``shared`` requests.
        """
        self._light = compute_us <= LIGHT_US * shared

    def leave(self) -> None:
        """Count a call as ended, and let all waiting calls continue."""
        self._in_flight -= 1
        if self._waiting:
            self._release()

    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for each in waiting:
            if not each.done():
                each.set_result(None)
