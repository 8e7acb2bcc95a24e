"""How much useless work one HTTP/2 client may cause before its connection ends."""

from __future__ import annotations

# A client may send so many frames that do no work, and as many more a second; work earns it some.
NUISANCES = 2000.0
NUISANCES_A_SECOND = 500.0
# Pings that come faster than this, while nothing is sent, are strikes; one more than so many ends it.
PING_INTERVAL_S = 5.0
PING_STRIKES = 4
# Calls that may be cancelled before their answer, beside four for each answered one.
RESETS = 200
# Bytes that may come for calls that have ended, beside one window for each call that begins.
STRAY_BYTES = 16 * 2**20


class FloodGuard:
    """Counts what one client does. Each method returns why its connection must end, or None."""

    __slots__ = ("_answered", "_left", "_pinged", "_resets", "_since", "_stray", "_strikes")

    def __init__(self, now: float) -> None:
        self._left = NUISANCES
        self._since = now
        self._pinged = -PING_INTERVAL_S
        self._strikes = 0
        self._resets = 0
        self._answered = 0
        self._stray = 0

    def nuisance(self, now: float) -> str | None:
        """Count a frame that does no work."""
        self._left -= 1
        if self._left >= 0:
            return None
        earned = (now - self._since) * NUISANCES_A_SECOND
        self._left, self._since = min(NUISANCES, self._left + earned), now
        return "too many frames that do no work" if self._left < 0 else None

    def ping(self, now: float) -> str | None:
        """Count a ping of the client's own."""
        if now - self._pinged < PING_INTERVAL_S:
            self._strikes += 1
        self._pinged = now
        return "too_many_pings" if self._strikes > PING_STRIKES else None

    def reset(self) -> str | None:
        """Count a call that the client cancelled before it was answered."""
        self._resets += 1
        return "too many cancelled calls" if self._resets > RESETS + 4 * self._answered else None

    def stray(self, count: int) -> str | None:
        """Count bytes for a call that has ended."""
        self._stray += count
        return "too many bytes for calls that have ended" if self._stray > STRAY_BYTES else None

    def begun(self, window: int) -> None:
        """A call began: if it ends early, as much as its window may still come."""
        self._stray = max(0, self._stray - window)

    def answered(self) -> None:
        """A call was answered."""
        self._answered += 1

    def sent(self, count: int) -> None:
        """So many bytes of answers were sent: a client acknowledges them with frames and pings."""
        self._left = min(NUISANCES, self._left + 4 + count / 2048)
        self._strikes = 0
