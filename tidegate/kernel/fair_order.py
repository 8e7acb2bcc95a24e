"""Share a resource fairly among callers, in proportion to their weights."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heappop, heappush, heapreplace
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

# A caller that was idle may send this many requests in a burst. After that, the requests of other callers go
# first. With a larger number, bursts would delay other callers. With a smaller number, a caller's second
# request would have to wait if it came soon after the first one.
BURST = 8.0
# An idle member keeps its place in the order (its tag), although most of these places no longer matter. The
# places that do not matter are dropped when there are more than 2 * (members with work) + IDLE_KEPT places.
IDLE_KEPT = 64


class FairOrder(Generic[K]):
    """The order in which members that have waiting work are served (start-time fair queueing).

    Source: Goyal, Vin and Cheng, "Start-time Fair Queueing", SIGCOMM 1996. Each member has a tag, which is a
    number. When work of a member is served, its tag rises by the work's cost divided by the member's weight.
    The member with the smallest tag is next. The clock is the tag of the member that was chosen last. When an
    idle member gets work, its tag is raised to the clock minus ``credit``, unless it is higher already. So a
    member that was idle is ahead of the others by at most ``credit``. While two members always have work,
    their tags rise at the same speed. :meth:`enter` and :meth:`first` take O(log n) time on average.
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
        """Add a member that has work now. Does nothing if the member has been added already."""
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
                heappop(heap)  # the member has left since it was pushed
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
        """Increase a member's tag by ``cost`` after work of this member was served.

        ``cost``: the cost of the work divided by the member's weight.
        """
        self._tags[member] = self._tags.get(member, self._clock) + cost

    def leave(self, member: K) -> None:
        """Remove a member that has no work now. Keep its tag while the tag can still delay its next work."""
        if self._entries.pop(member, None) is None:
            return
        if not self._entries:
            self._heap.clear()
        if len(self._tags) > 2 * len(self._entries) + IDLE_KEPT:
            # A member without a tag starts at the clock minus the credit. A member whose tag is not above
            # this value starts there as well, so its tag can be dropped.
            self._tags = {
                known: tag
                for known, tag in self._tags.items()
                if known in self._entries or tag > self._clock - self._credit
            }

    def clear(self) -> None:
        """Remove all members from the order. They keep their tags."""
        self._entries.clear()
        self._heap.clear()
