"""Limit the useless work that one HTTP/2 client may cause (floods of frames, pings, resets and data)."""

from __future__ import annotations

# A useless frame does no work for a request. A client may send USELESS_FRAMES of them. After each second, it
# may send USELESS_FRAMES_PER_S more. When the gateway sends bytes of an answer, the client may also send some
# more.
USELESS_FRAMES = 2000.0
USELESS_FRAMES_PER_S = 500.0
# A ping is a strike if it comes sooner than PING_INTERVAL_S after the ping before it. If the gateway sends
# data, the number of strikes becomes 0. More than PING_STRIKES strikes end the connection.
PING_INTERVAL_S = 5.0
PING_STRIKES = 4
# The number of calls that a client may cancel before it has their answers. For each answered call, it may
# cancel four more calls.
RESETS = 200
# The number of bytes that a client may send for calls that have ended. For each new call, it may send more of
# these bytes: as many as one flow-control window has.
LATE_BYTES = 16 * 2**20


class FloodGuard:
    """The counts of one client's useless work.

    A method that counts such work returns None if the connection may stay open. Otherwise, it returns the
    reason to end the connection.
    """

    __slots__ = ("_answered", "_late_bytes", "_left", "_pinged", "_resets", "_since", "_strikes")

    def __init__(self, now: float) -> None:
        self._left = USELESS_FRAMES
        self._since = now
        self._pinged = -PING_INTERVAL_S
        self._strikes = 0
        self._resets = 0
        self._answered = 0
        self._late_bytes = 0

    def useless_frame(self, now: float) -> str | None:
        """Count a frame that does no work."""
        self._left -= 1
        if self._left >= 0:
            return None
        earned = (now - self._since) * USELESS_FRAMES_PER_S
        self._left, self._since = min(USELESS_FRAMES, self._left + earned), now
        return "the client sends too many frames that belong to no request" if self._left < 0 else None

    def ping(self, now: float) -> str | None:
        """Count a ping from the client."""
        if now - self._pinged < PING_INTERVAL_S:
            self._strikes += 1
        self._pinged = now
        return "too_many_pings" if self._strikes > PING_STRIKES else None

    def reset(self) -> str | None:
        """Count a call that the client cancelled before it was answered."""
        self._resets += 1
        return "the client cancels too many calls" if self._resets > RESETS + 4 * self._answered else None

    def late_data(self, count: int) -> str | None:
        """Count bytes for a call that has ended."""
        self._late_bytes += count
        return (
            "the client sends too many bytes for calls that have ended"
            if self._late_bytes > LATE_BYTES
            else None
        )

    def call_began(self, window: int) -> None:
        """Allow one more flow-control window of late bytes, because a new call began.

        The client may send these bytes before it learns that this call has ended.
        """
        self._late_bytes = max(0, self._late_bytes - window)

    def answered(self) -> None:
        """Count an answered call."""
        self._answered += 1

    def sent(self, count: int) -> None:
        """Count sent bytes of answers.

        The client acknowledges these bytes with frames and pings, so it may send more of both.
        """
        self._left = min(USELESS_FRAMES, self._left + 4 + count / 2048)
        self._strikes = 0
