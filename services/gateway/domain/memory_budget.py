"""Limit the bytes that a process holds in memory. Code that holds bytes must report them here."""

from __future__ import annotations

from collections.abc import Callable

SMALL = 2**20
# Objects larger than SMALL may use only this part of the limit, so that small objects always have room.
SHARE_OF_LARGE = 7 / 8


class MemoryBudget:
    """A count of bytes in memory, with a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        # Called with the number of missing bytes if there is no room. The second argument is True if a caller
        # with a valid credential needs them. The callback may release bytes.
        self.reclaim: Callable[[int, bool], None] = lambda *_: None
        self._limit_large = int(limit * SHARE_OF_LARGE)

    def room(self, count: int, *, of: int = 0, known: bool = False) -> bool:
        """Return True if ``count`` more bytes fit. If they do not fit at first, call ``reclaim``."""
        limit = self.limit if max(count, of) <= SMALL else self._limit_large
        if self.used + count > limit:
            self.reclaim(self.used + count - limit, known)
        return self.used + count <= limit

    def take(self, count: int, of: int = 0, *, known: bool = False) -> bool:
        """Add ``count`` bytes of an object of ``of`` bytes in total. Return False if they do not fit.

        ``known``: True if the caller has sent a valid credential.
        """
        if not self.room(count, of=of, known=known):
            return False
        self.used += count
        return True

    def force(self, count: int) -> None:
        """Add bytes that are in memory already, even if they exceed the limit."""
        self.used += count

    def release(self, count: int) -> None:
        """Subtract ``count`` bytes that are no longer in memory."""
        self.used -= count
