"""Stop requests to a failing upstream for some time, and limit requests and tokens per minute. Pure.

The functions get the present time as an argument.
"""

from __future__ import annotations

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"


class Breaker:
    """A circuit breaker. After ``threshold`` failures in a row it is open: no request is sent.

    After ``pause_s`` seconds it is half-open: one request is sent as a test. If this request succeeds, the
    breaker closes. If it fails, the breaker is open for twice as long as before, but at most for
    ``longest_s`` seconds.
    """

    def __init__(self, threshold: int = 5, pause_s: float = 5.0, longest_s: float = 60.0) -> None:
        self._threshold, self._first_s, self._longest_s = threshold, pause_s, longest_s
        self._failures, self._pause_s, self._until = 0, pause_s, 0.0
        self._probing = False

    def state(self, now: float) -> str:
        """Return the state at the moment ``now``: closed, open or half-open."""
        if self._failures < self._threshold:
            return CLOSED
        return OPEN if now < self._until else HALF_OPEN

    def admit(self, now: float) -> float:
        """Return 0 if a request may be sent now, else the seconds until the next attempt.

        If the result is 0, the calling code must send the request. Then it must call :meth:`succeed`,
        :meth:`fail` or :meth:`abandon` once.
        """
        state = self.state(now)
        if state == CLOSED:
            return 0.0
        if state == OPEN:
            return self._until - now
        if self._probing:
            return 1.0
        self._probing = True
        return 0.0

    def succeed(self) -> None:
        """Record that the upstream answered a request. This closes the breaker."""
        self._failures, self._pause_s, self._probing = 0, self._first_s, False

    def fail(self, now: float) -> None:
        """Record that the upstream could not answer a request."""
        was = self.state(now)
        self._failures += 1
        if was == HALF_OPEN:
            self._pause_s = min(self._pause_s * 2, self._longest_s)
        if was != OPEN and self._failures >= self._threshold:
            self._until = now + self._pause_s
        self._probing = False

    def abandon(self) -> None:
        """Forget a request that was cancelled before the upstream answered."""
        self._probing = False


class MinuteLimit:
    """A limit of units per minute, such as requests or tokens.

    ``per_minute``: the limit; None means no limit. Units that are not used are saved up, but never more than
    ``per_minute``.
    """

    def __init__(self, per_minute: int | None, now: float) -> None:
        self._size, self._left, self._at = per_minute, float(per_minute or 0), now

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until ``amount`` units are available.

        If ``amount`` is above ``per_minute``, return the seconds until the units of a full minute are
        available.
        """
        if self._size is None:
            return 0.0
        self._refill(now)
        missing = min(amount, self._size) - self._left
        return max(missing * 60.0 / self._size, 0.0)

    def take(self, amount: float, now: float) -> None:
        """Take units; a negative amount puts units back. The balance may become negative."""
        self._refill(now)
        self._left = min(self._left - amount, float(self._size or 0))

    def _refill(self, now: float) -> None:
        if self._size is not None:
            self._left = min(self._left + (now - self._at) * self._size / 60.0, float(self._size))
        self._at = now
