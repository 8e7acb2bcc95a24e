"""Limit the number of events per second of each caller. Pure."""

from __future__ import annotations

from collections import OrderedDict

from tidegate.kernel.errors import TooMany

# The largest number of callers that are remembered. A caller that was forgotten may send a full burst again.
MOST_CALLERS = 10_000
BURST_S = 5.0


class Paces:
    """Limit each caller to ``per_s`` events per second. ``what`` names the events in the error.

    Each caller has a balance of events. The balance grows by ``per_s`` per second, up to ``per_s * BURST_S``.
    A call of :meth:`check` is accepted if the balance is above 0, even if the call has more events than the
    balance. In this case, the balance falls below 0, and later calls are refused until it is above 0 again.
    """

    def __init__(self, per_s: float, what: str) -> None:
        self._per_s = per_s
        self._what = what
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, caller: str, events: int, now: float) -> None:
        """Raise TooMany if a caller's balance is not above 0. Otherwise, subtract ``events`` from it.

        ``now``: monotonic seconds.
        """
        left, at = self._left.pop(caller, (self._per_s * BURST_S, now))
        left = min(self._per_s * BURST_S, left + (now - at) * self._per_s)
        if left <= 0:
            self._left[caller] = (left, now)
            raise TooMany(
                f"this caller sends more than {self._per_s:g} {self._what} per second, which is the limit: "
                "send fewer, or wait",
                retry_after_s=(1 - left) / self._per_s,
            )
        self._left[caller] = (left - events, now)
        if len(self._left) > MOST_CALLERS:
            self._left.popitem(last=False)
