"""The requests in hand, and which of them go into the next model call."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tidegate.kernel.protocol.envelope import LAST_PRIORITY, PRIORITY_SHIFT, Request

# Of a request that says none: between those that say they are urgent and those that can wait.
USUAL_PRIORITY = 4


class HasRequest(Protocol):
    """What stands in a line: something with a request."""

    request: Request


T = TypeVar("T", bound=HasRequest)


@dataclass(slots=True)
class UnackedDelivery:
    """A delivery and how many of its requests are still open; settled when none is."""

    channel: object
    tag: int
    reply_to: str
    open: int


@dataclass(slots=True)
class QueuedRequest:
    """A request in hand; ``received`` is on the worker's monotonic clock, in seconds."""

    request: Request
    delivery: UnackedDelivery
    received: float
    settled: bool = False


class Backlog:
    """Lines of one priority each; a lower number goes first, and its calls are filled up from behind."""

    def __init__(self) -> None:
        self._lines: dict[int, CallKeyQueue[QueuedRequest]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: QueuedRequest) -> None:
        """Put a request into the line of its priority."""
        level = item.request.flags >> PRIORITY_SHIFT & LAST_PRIORITY or USUAL_PRIORITY
        line = self._lines.get(level)
        if line is None:
            line = CallKeyQueue(key_of)
            self._lines = dict(sorted([*self._lines.items(), (level, line)]))
        line.add(item)
        self._count += 1

    def oldest(self) -> QueuedRequest | None:
        """The request at the head of the line that is next."""
        return self._next().oldest()

    def rows_at_head(self) -> int:
        """Rows that wait there under one key."""
        return self._next().rows_at_head()

    def take(self, max_rows: int) -> list[QueuedRequest]:
        """The next call: requests of one key, up to ``max_rows`` rows, at least one request."""
        line = self._next()
        group = line.take(max_rows)
        if group and len(self._lines) > 1:
            rows = sum(item.request.rows for item in group)
            for other in self._lines.values():
                if other is not line:
                    more = other.more(key_of(group[0]), max_rows - rows)
                    rows += sum(item.request.rows for item in more)
                    group += more
        self._count -= len(group)
        return group

    def take_all(self) -> list[QueuedRequest]:
        """Take out all requests, the urgent ones first."""
        found = [item for line in self._lines.values() for item in line.remove(lambda _: True)]
        self.clear()
        return found

    def clear(self) -> None:
        """Forget everything: its channel has ended and the broker delivers it again."""
        self._lines.clear()
        self._count = 0

    def _next(self) -> CallKeyQueue[QueuedRequest]:
        return next((line for line in self._lines.values() if line), _EMPTY)


def key_of(item: HasRequest) -> bytes:
    """What requests that may share a call have in common.

    What must not share one (no batch axis; not its first attempt, so that a request that kills workers takes
    no neighbour with it) has a key of its own.
    """
    request = item.request
    alone = request.rows == 0 or request.attempt > 0
    return request.id + request.key if alone else request.key


class CallKeyQueue(Generic[T]):
    """First come, first served over call keys; requests of one key share a call."""

    def __init__(self, key: Callable[[T], bytes]) -> None:
        self._key = key
        self._by_key: OrderedDict[bytes, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def add(self, item: T) -> None:
        """Put a request behind the others of its key."""
        self._by_key.setdefault(self._key(item), deque()).append(item)

    def remove(self, gone: Callable[[T], bool]) -> list[T]:
        """Take out those that ``gone`` says; gives them."""
        found = []
        for key, queue in list(self._by_key.items()):
            there = [item for item in queue if gone(item)]
            if there:
                left = deque(item for item in queue if not gone(item))
                found += there
                self._by_key[key] = left
                if not left:
                    del self._by_key[key]
        return found

    def oldest(self) -> T | None:
        """The request at the head of the line."""
        return next(iter(self._by_key.values()))[0] if self._by_key else None

    def rows_at_head(self) -> int:
        """Rows that wait under the key at the head of the line."""
        queue = next(iter(self._by_key.values()), ())
        return sum(item.request.rows for item in queue)

    def take(self, max_rows: int) -> list[T]:
        """Requests of the key at the head, up to ``max_rows`` rows, at least one request."""
        if not self._by_key:
            return []
        key, queue = next(iter(self._by_key.items()))
        group = [queue.popleft()]
        group += self.more(key, max_rows - group[0].request.rows)
        if queue:
            self._by_key.move_to_end(key)  # the other keys' turn
        return group

    def more(self, key: bytes, room: int) -> list[T]:
        """Requests of a key in their order, as long as their rows fit into ``room``."""
        queue = self._by_key.get(key)
        if queue is None:
            return []
        group = []
        while queue and queue[0].request.rows <= room:
            room -= queue[0].request.rows
            group.append(queue.popleft())
        if not queue:
            del self._by_key[key]
        return group


_EMPTY: CallKeyQueue[QueuedRequest] = CallKeyQueue(key_of)
