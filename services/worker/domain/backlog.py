"""The requests that wait for a model call, and the choice of the requests that share the next call."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tidegate.kernel.errors import TidegateError
from tidegate.kernel.fair_order import BURST, FairOrder
from tidegate.kernel.protocol.envelope import COPY, LAST_PRIORITY, PRIORITY_SHIFT, Request
from tidegate.kernel.protocol.tenant import weight_of

# The priority of a request that states none. It is between urgent requests and requests that can wait.
DEFAULT_PRIORITY = 4
# At most this many empty queues are kept. A tenant's next request uses the tenant's kept queue, because a new
# queue would take longer to create.
IDLE_KEPT = 64
# When a request arrives from another tenant than the last request, the model counts as shared by several
# tenants for this many seconds.
SHARED_S = 10.0


class HasRequest(Protocol):
    """An object with a request, such as an entry of a queue."""

    request: Request


T = TypeVar("T", bound=HasRequest)


@dataclass(slots=True)
class UnackedDelivery:
    """A delivery, and the number of its unsettled requests. When this is 0, the delivery is acked."""

    channel: object
    tag: int
    reply_to: str
    open: int


class OfSequence(Protocol):
    """The sequence of a request.

    ``error``: the failure of its latest request; None if that request has not failed.
    """

    error: TidegateError | None


@dataclass(slots=True)
class QueuedRequest:
    """A request that this worker has received.

    ``received``: its arrival, in seconds of the worker's monotonic clock. ``sequence``: the sequence to which
    the request belongs; None for most requests.
    """

    request: Request
    delivery: UnackedDelivery
    received: float
    settled: bool = False
    sequence: OfSequence | None = None


class Backlog:
    """The waiting requests, in one queue per tenant. Tenants get calls in proportion to weights.

    A tenant is one caller at one Endpoint. Of one tenant, the requests with the lowest priority number run
    first. If a call can take more rows, it also gets requests of other priorities and tenants. Copies for
    shadow traffic run last. They never share a call with requests, because a copy might kill the model. See
    :class:`FairOrder`.
    """

    def __init__(self) -> None:
        self._tenants: dict[bytes, _TenantQueue] = {}
        # Empty queues of tenants that have sent requests before. To create a new queue for each burst would
        # be slower.
        self._idle: dict[bytes, _TenantQueue] = {}
        self._order: FairOrder[bytes] = FairOrder(BURST)
        self._copies: CallKeyQueue[QueuedRequest] = CallKeyQueue(key_of)
        self._count = 0
        self._last = b""
        self._shared_at = float("-inf")

    def __len__(self) -> int:
        return self._count

    @property
    def copies(self) -> int:
        """Return how many of the requests are copies for shadow traffic."""
        return len(self._copies)

    def add(self, item: QueuedRequest) -> None:
        """Put a request into the queue of its tenant and priority."""
        if item.request.flags & COPY:
            self._copies.add(item)
            self._count += 1
            return
        tenant = item.request.tenant
        queue = self._tenants.get(tenant)
        if queue is None:
            queue = self._idle.pop(tenant, None)
            if queue is None:
                queue = _TenantQueue(weight_of(tenant))
            self._tenants[tenant] = queue
            self._order.enter(tenant)
            if len(self._tenants) > 1 or tenant != self._last:
                self._shared_at = item.received if self._last else self._shared_at
                self._last = tenant
        queue.add(item)
        self._count += 1

    def shared(self, now: float) -> bool:
        """Return True if several tenants have sent requests recently."""
        return now - self._shared_at < SHARED_S

    def oldest(self) -> QueuedRequest | None:
        """Return the oldest of the requests at the heads of the queues."""
        heads = [head for queue in self._tenants.values() if (head := queue.next().oldest()) is not None]
        if not heads:
            return self._copies.oldest()
        return min(heads, key=lambda item: item.received) if len(heads) > 1 else heads[0]

    def rows_at_head(self) -> int:
        """Return how many waiting rows have the same call key as the next request."""
        tenant = self._order.first()
        if tenant is None:
            return self._copies.rows_at_head()
        queue = self._tenants[tenant].next()
        head = queue.oldest()
        if head is None or len(self._tenants) == 1:
            return queue.rows_at_head()
        return sum(other.next().rows_of(key_of(head)) for other in self._tenants.values())

    def take(self, max_rows: int) -> list[QueuedRequest]:
        """Remove and return the requests of the next call. They have the same call key.

        They have at most ``max_rows`` rows in total. A first request with more rows is returned alone.
        """
        tenant = self._order.first()
        if tenant is None:
            copies = self._copies.take(max_rows)
            self._count -= len(copies)
            return copies
        group = self._tenants[tenant].take(max_rows)
        rows = self._served(tenant, group)
        if self._tenants and (len(self._tenants) > 1 or tenant not in self._tenants):
            key = key_of(group[0])
            for other in self._order.ranked():
                if rows >= max_rows:
                    break
                more = self._tenants[other].take_more(key, max_rows - rows)
                rows += self._served(other, more)
                group += more
        self._count -= len(group)
        return group

    def _served(self, tenant: bytes, group: list[QueuedRequest]) -> int:
        """Count the rows of a call against the tenant's fair share. Return the number of these rows."""
        queue = self._tenants[tenant]
        rows = sum(item.request.rows for item in group)
        if group:
            self._order.charge(tenant, max(rows, len(group)) / queue.weight)
        if not queue.next():
            del self._tenants[tenant]
            if len(self._idle) >= IDLE_KEPT:
                self._idle.clear()
            self._idle[tenant] = queue
            self._order.leave(tenant)
        return rows

    def take_all(self) -> list[QueuedRequest]:
        """Remove and return all requests. For each tenant, the urgent ones come first."""
        items = [item for queue in self._tenants.values() for item in queue.take_all()]
        items += self._copies.remove(lambda _: True)
        self.clear()
        return items

    def clear(self) -> None:
        """Discard all requests, because their channel has ended. The broker delivers them again."""
        self._tenants.clear()
        self._order.clear()
        self._copies = CallKeyQueue(key_of)
        self._count = 0


class _TenantQueue:
    """The requests of one tenant: a queue for each priority."""

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self._queues: dict[int, CallKeyQueue[QueuedRequest]] = {}

    def add(self, item: QueuedRequest) -> None:
        """Queue a request at its priority."""
        priority = item.request.flags >> PRIORITY_SHIFT & LAST_PRIORITY or DEFAULT_PRIORITY
        queue = self._queues.get(priority)
        if queue is None:
            queue = CallKeyQueue(key_of)
            self._queues = dict(sorted([*self._queues.items(), (priority, queue)]))
        queue.add(item)

    def next(self) -> CallKeyQueue[QueuedRequest]:
        """Return the queue of the most urgent requests; an empty one if none waits."""
        return next((queue for queue in self._queues.values() if queue), _EMPTY)

    def take(self, max_rows: int) -> list[QueuedRequest]:
        """Remove and return the requests of the next call, the most urgent ones first.

        If the call can take more rows, add less urgent requests with the same call key.
        """
        queue = self.next()
        group = queue.take(max_rows)
        if len(self._queues) > 1:
            rows = sum(item.request.rows for item in group)
            group += self.take_more(key_of(group[0]), max_rows - rows, but=queue)
        return group

    def take_more(
        self, key: bytes, max_rows: int, *, but: CallKeyQueue[QueuedRequest] | None = None
    ) -> list[QueuedRequest]:
        """Remove and return requests with this call key, while their rows fit into ``max_rows``.

        Skip the queue ``but``.
        """
        group: list[QueuedRequest] = []
        for queue in self._queues.values():
            if queue is not but:
                more = queue.take_more(key, max_rows)
                max_rows -= sum(item.request.rows for item in more)
                group += more
        return group

    def take_all(self) -> list[QueuedRequest]:
        """Remove and return all requests, the urgent ones first."""
        return [item for queue in self._queues.values() for item in queue.remove(lambda _: True)]


def key_of(item: HasRequest) -> bytes:
    """Return the call key of a request. Requests with the same call key can share a call.

    A request without a batch axis has a call key of its own, so it runs alone. A request that was tried
    before also runs alone. It may have killed a worker, and could harm other requests in its call.
    """
    request = item.request
    alone = request.rows == 0 or request.attempt > 0
    return request.id + request.key if alone else request.key


class CallKeyQueue(Generic[T]):
    """A queue that serves call keys in turn. Requests with the same call key share a call."""

    def __init__(self, key: Callable[[T], bytes]) -> None:
        self._key = key
        self._by_key: OrderedDict[bytes, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def __len__(self) -> int:
        return sum(map(len, self._by_key.values()))

    def add(self, item: T) -> None:
        """Queue a request behind the other requests with its call key."""
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
        """Return how many rows in the queue have the call key of the request at its head."""
        items = next(iter(self._by_key.values()), ())
        return sum(item.request.rows for item in items)

    def rows_of(self, key: bytes) -> int:
        """Return how many rows in the queue have this call key."""
        return sum(item.request.rows for item in self._by_key.get(key, ()))

    def take(self, max_rows: int) -> list[T]:
        """Remove and return the first requests that have the call key of the queue's head.

        They have at most ``max_rows`` rows in total. If the first request has more rows, it is returned
        alone.
        """
        if not self._by_key:
            return []
        key, items = next(iter(self._by_key.items()))
        group = [items.popleft()]
        group += self.take_more(key, max_rows - group[0].request.rows)
        if items:
            self._by_key.move_to_end(key)  # the next call serves another call key
        return group

    def take_more(self, key: bytes, max_rows: int) -> list[T]:
        """Remove and return requests with this call key, in order, while their rows fit into ``max_rows``."""
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
