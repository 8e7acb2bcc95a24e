"""The requests that wait for a model call, and the choice of those that share the next one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tidegate.kernel.protocol.envelope import PRIORITY_SHIFT, Request

# The priority of a request that states none. It is between the urgent requests and those that can wait.
DEFAULT_PRIORITY = 4
# The priority of copies for shadow traffic. Their flag COPY is the bit above those of the priority.
COPIES = 8


class HasRequest(Protocol):
    """An entry of a queue. It has a request."""

    request: Request


T = TypeVar("T", bound=HasRequest)


@dataclass(slots=True)
class UnackedDelivery:
    """A delivery, and the number of its requests that are not settled. At 0 the delivery is acked."""

    channel: object
    tag: int
    reply_to: str
    open: int


@dataclass(slots=True)
class QueuedRequest:
    """A request of this worker; ``received`` is in seconds of the worker's monotonic clock."""

    request: Request
    delivery: UnackedDelivery
    received: float
    settled: bool = False


class Backlog:
    """A queue for each priority. The lowest number goes first; other priorities fill its calls up.

    Copies for shadow traffic go last, and share no call with requests, because they might kill the model.
    """

    def __init__(self) -> None:
        self._queues: dict[int, CallKeyQueue[QueuedRequest]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: QueuedRequest) -> None:
        """Queue a request at its priority."""
        priority = item.request.flags >> PRIORITY_SHIFT or DEFAULT_PRIORITY
        queue = self._queues.get(priority)
        if queue is None:
            queue = CallKeyQueue(key_of)
            self._queues = dict(sorted([*self._queues.items(), (priority, queue)]))
        queue.add(item)
        self._count += 1

    def oldest(self) -> QueuedRequest | None:
        """Return the request at the head of the next queue."""
        return self._next().oldest()

    def rows_at_head(self) -> int:
        """Return how many rows in the next queue have the key of its first request."""
        return self._next().rows_at_head()

    def take(self, max_rows: int) -> list[QueuedRequest]:
        """Remove and return the requests of the next call. They have one key, and at most ``max_rows`` rows.

        A first request with more rows is returned alone.
        """
        queue = self._next()
        group = queue.take(max_rows)
        if group and len(self._queues) > 1:
            rows = sum(item.request.rows for item in group)
            for priority, other in self._queues.items():
                if other is not queue and priority < COPIES:
                    more = other.take_more(key_of(group[0]), max_rows - rows)
                    rows += sum(item.request.rows for item in more)
                    group += more
        self._count -= len(group)
        return group

    def take_all(self) -> list[QueuedRequest]:
        """Remove and return all requests, the urgent ones first."""
        items = [item for queue in self._queues.values() for item in queue.remove(lambda _: True)]
        self.clear()
        return items

    def clear(self) -> None:
        """Discard all requests. Their channel has ended, so the broker delivers them again."""
        self._queues.clear()
        self._count = 0

    def _next(self) -> CallKeyQueue[QueuedRequest]:
        return next((queue for queue in self._queues.values() if queue), _EMPTY)


def key_of(item: HasRequest) -> bytes:
    """Return the key that requests of one call share.

    A request has a separate key if it has no batch axis, or if this is not its first attempt. A request that
    kills workers must not share its call with others.
    """
    request = item.request
    alone = request.rows == 0 or request.attempt > 0
    return request.id + request.key if alone else request.key


class CallKeyQueue(Generic[T]):
    """A first-come, first-served queue over call keys; requests of one key share a call."""

    def __init__(self, key: Callable[[T], bytes]) -> None:
        self._key = key
        self._by_key: OrderedDict[bytes, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def add(self, item: T) -> None:
        """Queue a request behind the others of its key."""
        self._by_key.setdefault(self._key(item), deque()).append(item)

    def remove(self, chosen: Callable[[T], bool]) -> list[T]:
        """Remove and return the requests for which ``chosen`` returns True."""
        removed = []
        for key, items in list(self._by_key.items()):
            matches = [item for item in items if chosen(item)]
            if matches:
                rest = deque(item for item in items if not chosen(item))
                removed += matches
                self._by_key[key] = rest
                if not rest:
                    del self._by_key[key]
        return removed

    def oldest(self) -> T | None:
        """Return the request at the head of the queue."""
        return next(iter(self._by_key.values()))[0] if self._by_key else None

    def rows_at_head(self) -> int:
        """Return how many rows in the queue have the key at its head."""
        items = next(iter(self._by_key.values()), ())
        return sum(item.request.rows for item in items)

    def take(self, max_rows: int) -> list[T]:
        """Remove and return the first requests of the key at the head, with at most ``max_rows`` rows.

        A first request with more rows is returned alone.
        """
        if not self._by_key:
            return []
        key, items = next(iter(self._by_key.items()))
        group = [items.popleft()]
        group += self.take_more(key, max_rows - group[0].request.rows)
        if items:
            self._by_key.move_to_end(key)  # now the other keys are ahead of it
        return group

    def take_more(self, key: bytes, max_rows: int) -> list[T]:
        """Remove and return requests of a key, in order, while their rows fit into ``max_rows``."""
        items = self._by_key.get(key)
        if items is None:
            return []
        group = []
        while items and items[0].request.rows <= max_rows:
            max_rows -= items[0].request.rows
            group.append(items.popleft())
        if not items:
            del self._by_key[key]
        return group


_EMPTY: CallKeyQueue[QueuedRequest] = CallKeyQueue(key_of)
