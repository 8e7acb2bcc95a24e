"""The order in which callers that share something are served: fair by weight, in virtual time."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heappop, heappush, heapreplace
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

# The credit for requests of several callers, in requests: an idle caller may send this many in a burst. More
# would let bursts of idle callers delay the others, less would delay a second request that comes early.
BURST = 8.0
# Idle members are forgotten when there are more than this many beside those that wait.
IDLE_KEPT = 64


class FairOrder(Generic[K]):
    """Start-time fair queueing over members, each of which has work that waits, or has none.

    Source: Goyal, Vin and Cheng, "Start-time Fair Queueing", SIGCOMM 1996. Each member has a tag: the cost of
    its served work divided by its weight. The member with the smallest tag is next. The clock is the tag of
    the last choice. A member that was idle starts at the clock less ``credit``, so it saves up only that. Any
    two members that always have work differ in served cost per weight by at most one piece of each. Every
    call takes O(log n).
    """

    def __init__(self, credit: float = 0.0) -> None:
        self._credit = credit
        self._tags: dict[K, float] = {}
        self._entries: dict[K, int] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._count = 0
        self._clock = 0.0

    def __len__(self) -> int:
        """Return how many members have work that waits."""
        return len(self._entries)

    def enter(self, member: K) -> None:
        """Add a member that has work now. It does nothing if the member is there."""
        if member in self._entries:
            return
        tag = self._tags[member] = max(self._tags.get(member, 0.0), self._clock - self._credit)
        self._count += 1
        self._entries[member] = self._count
        heappush(self._heap, (tag, self._count, member))

    def first(self) -> K | None:
        """Return the member whose work is next, or None if no member has work."""
        heap = self._heap
        while heap:
            tag, entry, member = heap[0]
            if self._entries.get(member) != entry:
                heappop(heap)  # the member has left since
            elif self._tags[member] > tag:
                heapreplace(heap, (self._tags[member], entry, member))
            else:
                self._clock = max(self._clock, tag)
                return member
        return None

    def ranked(self) -> list[K]:
        """Return the members that have work, in the order of their tags."""
        return sorted(self._entries, key=self._tags.__getitem__)

    def charge(self, member: K, cost: float) -> None:
        """Count served work of a member. ``cost``: the cost of the work divided by the member's weight."""
        self._tags[member] = self._tags.get(member, self._clock) + cost

    def leave(self, member: K) -> None:
        """Remove a member that has no work now. Its tag is kept as long as it matters."""
        if self._entries.pop(member, None) is None:
            return
        if not self._entries:
            self._heap.clear()
        if len(self._tags) > 2 * len(self._entries) + IDLE_KEPT:
            # A tag that is not above the clock has no effect, because its member would start at the clock.
            self._tags = {
                known: tag
                for known, tag in self._tags.items()
                if known in self._entries or tag > self._clock - self._credit
            }

    def clear(self) -> None:
        """Remove all members that have work."""
        self._entries.clear()
        self._heap.clear()
