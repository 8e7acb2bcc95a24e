"""Limit the bytes that a process keeps in memory. Only bytes that are reported here count."""

from __future__ import annotations

from collections.abc import Callable

SMALL = 2**20
# Objects larger than SMALL bytes may use only this fraction of the limit. The rest is reserved for smaller
# objects.
SHARE_OF_LARGE = 7 / 8


class MemoryBudget:
    """A count of bytes in memory, with a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        # This function is called if new bytes do not fit, and may release other bytes. The first argument is
        # the number of missing bytes. The second is True if the new bytes belong to a caller with a valid
        # credential.
        self.reclaim: Callable[[int, bool], None] = lambda *_: None
        self._limit_large = int(limit * SHARE_OF_LARGE)

    def room(self, count: int, *, of: int = 0, known: bool = False) -> bool:
        """Return True if ``count`` more bytes fit. If they do not fit, call ``reclaim`` and check again.

        ``of``: the total bytes of the object. ``known``: True if the caller has sent a valid credential.
        """
        limit = self.limit if max(count, of) <= SMALL else self._limit_large
        if self.used + count > limit:
            self.reclaim(self.used + count - limit, known)
        return self.used + count <= limit

    def take(self, count: int, of: int = 0, *, known: bool = False) -> bool:
        """Count ``count`` more bytes as used. Return False if they do not fit.

        ``of``: the total bytes of the object. ``known``: True if the caller has sent a valid credential.
        """
        if not self.room(count, of=of, known=known):
            return False
        self.used += count
        return True

    def force(self, count: int) -> None:
        """Count bytes that are in memory already, even if they exceed the limit."""
        self.used += count

    def release(self, count: int) -> None:
        """Subtract ``count`` bytes that are no longer in memory."""
        self.used -= count
