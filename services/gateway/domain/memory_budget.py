"""How many bytes may be in memory at once, counted by those who hold them."""

from __future__ import annotations

from collections.abc import Callable

SMALL = 2**20
# What is small finds room even when large bodies have taken all of theirs.
SHARE_OF_LARGE = 7 / 8


class MemoryBudget:
    """Bytes in hand, against a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        # Called with the bytes that are missing when there is no room, and whether it is a caller with a
        # credential who needs them; it may give some back.
        self.reclaim: Callable[[int, bool], None] = lambda *_: None
        self._limit_large = int(limit * SHARE_OF_LARGE)

    def room(self, count: int, *, of: int = 0, known: bool = False) -> bool:
        """Return True if ``count`` more bytes fit, if need be after reclaiming some."""
        limit = self.limit if max(count, of) <= SMALL else self._limit_large
        if self.used + count > limit:
            self.reclaim(self.used + count - limit, known)
        return self.used + count <= limit

    def take(self, count: int, of: int = 0, *, known: bool = False) -> bool:
        """Count ``count`` bytes more, of something that has ``of`` in all; False: there is no room.

        ``known``: for a caller with a credential.
        """
        if not self.room(count, of=of, known=known):
            return False
        self.used += count
        return True

    def force(self, count: int) -> None:
        """Count bytes that are there already, room or not."""
        self.used += count

    def give(self, count: int) -> None:
        """These bytes are gone."""
        self.used -= count
