"""Limit the number of events per second of each caller. Pure."""

from __future__ import annotations

from collections import OrderedDict

from tidegate.kernel.errors import TooMany

# The largest number of callers in memory. A forgotten caller starts with a full burst.
MOST_CALLERS = 10_000
BURST_S = 5.0


class Paces:
    """A limit of ``per_s`` events per second for each caller. ``what`` names the events in the error.

    A caller may save the events of ``BURST_S`` seconds. A call passes if the caller has any events left, even
    if the call has more events; the caller then owes the difference. So one large call passes, and the next
    one is refused.
    """

    def __init__(self, per_s: float, what: str) -> None:
        self._per_s = per_s
        self._what = what
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, caller: str, events: int, now: float) -> None:
        """Count ``events`` of a caller at ``now`` (monotonic, in seconds). Raise TooMany at the limit."""
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
