"""Bound the bytes that a process holds in memory; the holders count them."""

from __future__ import annotations

from collections.abc import Callable

SMALL = 2**20
# Large bodies may take only this share, so that small ones always find room.
SHARE_OF_LARGE = 7 / 8


class MemoryBudget:
    """A count of bytes in memory, with a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        # Called if there is no room, with the missing bytes, and True if a caller with a credential needs
        # them. It may release some.
        self.reclaim: Callable[[int, bool], None] = lambda *_: None
        self._limit_large = int(limit * SHARE_OF_LARGE)

    def room(self, count: int, *, of: int = 0, known: bool = False) -> bool:
        """Return True if ``count`` more bytes fit, perhaps after reclaiming some."""
        limit = self.limit if max(count, of) <= SMALL else self._limit_large
        if self.used + count > limit:
            self.reclaim(self.used + count - limit, known)
        return self.used + count <= limit

    def take(self, count: int, of: int = 0, *, known: bool = False) -> bool:
        """Count ``count`` more bytes of an object of ``of`` bytes in all; return False if there is no room.

        ``known``: the caller has sent a valid credential.
        """
        if not self.room(count, of=of, known=known):
            return False
        self.used += count
        return True

    def force(self, count: int) -> None:
        """Count bytes that are in memory already, even over the limit."""
        self.used += count

    def release(self, count: int) -> None:
        """Count ``count`` bytes less: they are free."""
        self.used -= count
