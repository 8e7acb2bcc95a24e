"""The requests in hand, and which of them go into the next model call."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from tidegate.protocol.envelope import Request


@dataclass(slots=True)
class Parcel:
    """A delivery and how many of its requests are still open; settled when none is."""

    session: object
    tag: int
    reply_to: str
    open: int


@dataclass(slots=True)
class Item:
    """A request in hand; ``received`` is on the worker's monotonic clock, in seconds."""

    request: Request
    parcel: Parcel
    received: float


class Backlog:
    """First come, first served over call keys; requests of one key share a call."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[bytes, deque[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item) -> None:
        """Put a request behind the others of its key.

        What must not share a call (no batch axis; not its first attempt, so that a request that kills
        workers takes no neighbour with it) gets a key of its own.
        """
        request = item.request
        alone = request.rows == 0 or request.attempt > 0
        key = request.id + request.key if alone else request.key
        self._by_key.setdefault(key, deque()).append(item)
        self._count += 1

    def oldest(self) -> Item | None:
        """The request at the head of the line."""
        return next(iter(self._by_key.values()))[0] if self._by_key else None

    def rows_at_head(self) -> int:
        """Rows that wait under the key at the head of the line."""
        queue = next(iter(self._by_key.values()), ())
        return sum(item.request.rows for item in queue)

    def take(self, max_rows: int) -> list[Item]:
        """The next call: requests of the key at the head, up to ``max_rows`` rows, at least one request."""
        if not self._by_key:
            return []
        key, queue = next(iter(self._by_key.items()))
        group = [queue.popleft()]
        rows = group[0].request.rows
        while queue and rows + queue[0].request.rows <= max_rows:
            rows += queue[0].request.rows
            group.append(queue.popleft())
        if queue:
            self._by_key.move_to_end(key)  # the other keys' turn
        else:
            del self._by_key[key]
        self._count -= len(group)
        return group

    def clear(self) -> None:
        """Forget everything: its session has ended and the broker delivers it again."""
        self._by_key.clear()
        self._count = 0
