"""A token bucket, which limits events per second."""

from __future__ import annotations


class TokenBucket:
    """A limiter that allows ``per_s`` events per second, and a burst of up to ``burst`` events.

    ``dropped``: the number of rejected events since the last call of :meth:`settled`.
    """

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._most = self._left = burst
        self._at = 0.0
        self.dropped = 0

    def take(self, now: float) -> bool:
        """Return True if one more event is allowed at ``now``, in seconds of a monotonic clock."""
        self._left = min(self._most, self._left + max(0.0, now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            self.dropped += 1
            return False
        self._left -= 1
        return True

    def settled(self) -> int:
        """Return the number of rejected events since the last call of this method."""
        found, self.dropped = self.dropped, 0
        return found
