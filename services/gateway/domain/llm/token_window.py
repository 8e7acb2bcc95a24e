"""Count the tokens that a caller used at language models in the last minute and on this day.

The window slides: in any 60 seconds, the charges stay within the limit. All charges of one second are counted
together. The same algorithm runs in the store (``tidegate/kernel/store/lua/tokens_charge.lua``) for all
gateway processes. This module is for a process that cannot reach the store.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tidegate.kernel.protocol.access import TokenAllowance

WINDOW_S = 60
DAY_S = 86_400

Refused = Literal["", "minute", "day"]


@dataclass(frozen=True, slots=True)
class TokenBalance:
    """The state of an account before a request is charged.

    ``used``, ``day_used``: the tokens charged in the last minute and on this day. ``wait_ms``: the time until
    the limit per minute allows the request. ``reset_ms``: the time until the window has no charge.
    ``day_ms``: the time until the day ends. ``refused``: the limit that the request would exceed, or empty.
    """

    used: int = 0
    day_used: int = 0
    wait_ms: float = 0.0
    reset_ms: float = 0.0
    day_ms: float = 0.0
    refused: Refused = ""


@dataclass(slots=True)
class TokenWindow:
    """The charged tokens of one account.

    The parameter ``now`` of the methods is in seconds since the epoch.
    """

    charges: dict[int, int] = field(default_factory=dict)
    day: int = 0
    day_used: int = 0

    def balance(self, tokens: int, limit: TokenAllowance, now: float) -> TokenBalance:
        """Return the account's state before a request of ``tokens`` tokens is charged."""
        self._forget(now)
        used = sum(self.charges.values())
        missing = 0 if limit.minute is None else used + tokens - limit.minute
        wait_s = reset_s = 0.0
        for at, count in sorted(self.charges.items()):
            reset_s = at + 1 + WINDOW_S - now
            if missing > 0:
                wait_s, missing = reset_s, missing - count
        refused: Refused = ""
        if limit.day is not None and self.day_used + tokens > limit.day:
            refused = "day"
        if limit.minute is not None and used + tokens > limit.minute:
            refused = "minute"
        day_ms = (DAY_S - now % DAY_S) * 1e3
        return TokenBalance(used, self.day_used, wait_s * 1e3, reset_s * 1e3, day_ms, refused)

    def charge(self, tokens: int, now: float) -> int:
        """Charge ``tokens``. Return the time of the charge in whole seconds, for :meth:`settle`."""
        self._forget(now)
        second = int(now)
        self.charges[second] = self.charges.get(second, 0) + tokens
        self.day_used += tokens
        return second

    def settle(self, at: int, difference: int, now: float) -> None:
        """Correct an earlier charge by ``difference`` tokens.

        ``at``: the second of the charge. If this second is still in the window, its charge is corrected.
        Otherwise, a positive difference is charged to the present second, and a negative difference does not
        change the window. The count of the day is also corrected, but a negative difference changes it only
        on the day of the charge.
        """
        self._forget(now)
        second = at if at + 1 + WINDOW_S > now else int(now)
        if second == at or difference > 0:
            left = self.charges.get(second, 0) + difference
            if left > 0:
                self.charges[second] = left
            else:
                self.charges.pop(second, None)
        if difference > 0 or at // DAY_S == self.day:
            self.day_used = max(0, self.day_used + difference)

    def _forget(self, now: float) -> None:
        if int(now // DAY_S) != self.day:
            self.day, self.day_used = int(now // DAY_S), 0
        gone = [at for at in self.charges if at + 1 + WINDOW_S <= now]
        for at in gone:
            del self.charges[at]
