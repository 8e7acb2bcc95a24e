"""Share a Deployment among its callers: choose the next request to publish to its queue.

The broker's queue is first in, first out, so the gateway cannot change the order of published requests. So it
publishes only as many requests as the replicas need to stay busy. This number is the window. The other
requests wait in the gateway, and the next one is chosen fairly by weight. The requests of a caller that uses
less than its share of the window do not wait. If there is only one caller, it may use the whole window.

Linux uses the same method for network cards (byte queue limits). It keeps the card's own queue short. The
other packets wait in a queue before it, where Linux can choose the next one. See
:class:`~tidegate.kernel.fair_order.FairOrder` for the order of the waiting requests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from tidegate.kernel.fair_order import BURST, FairOrder
from tidegate.kernel.protocol.tenant import tenant_of

T = TypeVar("T")

UNLIMITED = sys.maxsize
# The priority of a request that sets none. The worker's backlog uses the same value.
DEFAULT_PRIORITY = 4
# If a FairLane has this many flows, it removes the flows without requests before it adds another flow.
IDLE_KEPT = 1024


class FlowKey(NamedTuple):
    """The key of a flow: one caller at one endpoint.

    ``weight``: the caller's weight, multiplied by the endpoint's weight.
    """

    endpoint: str
    caller: str
    weight: int = 1

    def __str__(self) -> str:
        """Return the key as text, for a report."""
        return f"{self.endpoint}/{self.caller}"


NO_CALLER = FlowKey("", "")


class FlowLoad(NamedTuple):
    """The number of unanswered requests of a flow at other gateways, and the weight of the flow."""

    outstanding: int
    weight: int


class Standing(NamedTuple):
    """A caller's load at a Deployment. It decides if the caller's next request is admitted.

    ``outstanding``: the caller's unanswered requests at all gateways. ``share``: the caller's fair share of
    the Deployment (0 to 1).
    """

    outstanding: int
    share: float


@dataclass(slots=True, eq=False)
class Flow(Generic[T]):
    """One flow of a :class:`FairLane`. ``outstanding``: the number of its unanswered requests.

    ``published``: how many of these requests are published, and so use the window. ``tenant``: the field
    ``tenant`` of the flow's request frames. ``name``: the key as text. ``held``: a heap of the requests that
    are not published yet, by (priority, order of arrival).
    """

    key: FlowKey
    weight: int
    tenant: bytes
    name: str
    outstanding: int = 0
    published: int = 0
    held: list[tuple[int, int, float, T]] = field(default_factory=list)


class FairLane(Generic[T]):
    """Count the published requests of one queue, and hold the other requests until their turn."""

    def __init__(self) -> None:
        self.window = UNLIMITED
        self.published = 0
        self.held = 0
        self._flows: dict[FlowKey, Flow[T]] = {}
        # The flow of the last request. The next request often has the same caller, so this often saves a
        # lookup.
        self._last: tuple[FlowKey, Flow[T]] | None = None
        self._order: FairOrder[FlowKey] = FairOrder(BURST)
        self._elsewhere: Mapping[str, FlowLoad] = {}
        # The flows that have no requests at this gateway, but had requests at other gateways at the last
        # report. The variable _other_weight is the sum of the weights of these flows.
        self._only_elsewhere: Mapping[str, FlowLoad] = {}
        self._other_weight = 0
        self._active_weight = 0
        self._count = 0
        self._releasing = False

    def flow(self, key: FlowKey) -> Flow[T]:
        """Return the flow of a caller at an endpoint. The first call creates it."""
        last = self._last
        if last is not None and last[0] is key:
            return last[1]
        flow = self._flows.get(key)
        if flow is None:
            if len(self._flows) >= IDLE_KEPT:
                self._flows = {
                    known: flow for known, flow in self._flows.items() if flow.outstanding or flow.held
                }
            endpoint, caller, weight = key
            flow = self._flows[key] = Flow(key, weight, tenant_of(caller, endpoint, weight), str(key))
        self._last = (key, flow)
        return flow

    def arrive(self, flow: Flow[T]) -> None:
        """Count a new request of a flow."""
        flow.outstanding += 1
        if flow.outstanding == 1:
            self._active_weight += flow.weight

    def settle(self, flow: Flow[T], *, published: bool) -> None:
        """Count a request of a flow as answered.

        Then the calling code must call :meth:`release`, because a held request may fit into the window now.
        """
        flow.outstanding -= 1
        if flow.outstanding == 0:
            self._active_weight -= flow.weight
        if published:
            flow.published -= 1
            self.published -= 1

    def take(self, flow: Flow[T], cost: float = 1.0) -> bool:
        """Decide if a new request is published now. Return False if the request must be held.

        If the window is not full and no request is held, the result is True. Otherwise, the result is True
        only if the request's flow holds no request and uses less than its share of the window. If the result
        is True, the request is counted as published.
        """
        if self.published < self.window and not self.held:
            flow.published += 1
            self.published += 1
            return True
        if flow.held or flow.published + 1 > self.share(flow) * self.window:
            return False
        self._order.charge(flow.key, cost / flow.weight)
        flow.published += 1
        self.published += 1
        return True

    def hold(self, flow: Flow[T], item: T, priority: int = 0, cost: float = 1.0) -> None:
        """Hold a request until its turn. Within a flow, requests with a smaller ``priority`` go first.

        A ``priority`` of 0 means ``DEFAULT_PRIORITY``.
        """
        self._count += 1
        heappush(flow.held, (priority or DEFAULT_PRIORITY, self._count, cost, item))
        self.held += 1
        self._order.enter(flow.key)

    def release(self) -> Iterator[T]:
        """Yield the held requests that must be published now.

        If a yielded request has already ended, the calling code must call :meth:`skip` for it.

        If the calling code cannot publish a request, its error handling calls this method again, while the
        first call is still running. This second call yields nothing, and the first call continues with the
        next request. So calls do not nest deeply while the broker is down.
        """
        if self._releasing:
            return
        self._releasing = True
        try:
            while self.held and self.published < self.window and (key := self._order.first()) is not None:
                flow = self._flows[key]
                _, _, cost, item = heappop(flow.held)
                self.held -= 1
                if not flow.held:
                    self._order.leave(key)
                flow.published += 1
                self.published += 1
                self._order.charge(key, cost / flow.weight)
                yield item
        finally:
            self._releasing = False

    def skip(self, flow: Flow[T], cost: float = 1.0) -> None:
        """Undo the release of a request that ended while it was held."""
        flow.published -= 1
        self.published -= 1
        self._order.charge(flow.key, -cost / flow.weight)

    # --- shares ----------------------------------------------------------------------------------------

    def learn(self, elsewhere: Mapping[str, FlowLoad]) -> None:
        """Set the loads of flows at other gateways.

        ``elsewhere``: the load of each flow, by its key as text.
        """
        here = {flow.name for flow in self._flows.values() if flow.outstanding}
        self._elsewhere = elsewhere
        self._only_elsewhere = {name: load for name, load in elsewhere.items() if name not in here}
        self._other_weight = sum(load.weight for load in self._only_elsewhere.values())

    def contended(self, flow: Flow[T]) -> bool:
        """Return True if another flow has unanswered requests, here or at another gateway."""
        if self._active_weight != (flow.weight if flow.outstanding else 0):
            return True
        return bool(self._elsewhere) and (len(self._elsewhere) > 1 or flow.name not in self._elsewhere)

    def share(self, flow: Flow[T]) -> float:
        """Return a flow's fair share of the Deployment now: above 0, at most 1."""
        total = self._active_weight if flow.outstanding else self._active_weight + flow.weight
        if self._only_elsewhere:
            total += self._other_weight
            if flow.name in self._only_elsewhere:
                total -= self._only_elsewhere[flow.name].weight
        return flow.weight / total

    def elsewhere(self, flow: Flow[T]) -> int:
        """Return the number of unanswered requests of a flow at other gateways."""
        load = self._elsewhere.get(flow.name) if self._elsewhere else None
        return load.outstanding if load is not None else 0

    def loads(self, most: int) -> dict[str, list[int]]:
        """Return [unanswered requests, weight] by flow (its key as text), for at most ``most`` flows.

        The busiest flows are chosen.
        """
        active = [flow for flow in self._flows.values() if flow.outstanding]
        active.sort(key=lambda flow: flow.outstanding, reverse=True)
        return {flow.name: [flow.outstanding, flow.weight] for flow in active[:most]}
