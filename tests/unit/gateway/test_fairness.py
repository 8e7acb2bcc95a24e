"""The latency of one caller beside a flood of another: gateways, a broker and workers in simulated time.

The decisions are the real ones: the gateway's lanes and the worker's backlog. Only the time is simulated.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count, pairwise

import pytest

from services.gateway.domain.fair_lane import UNLIMITED, FairLane, Flow, FlowKey, FlowLoad
from services.gateway.domain.replica_fleet import (
    STARTING_WINDOW,
    UNKNOWN_FLEET,
    ReplicaFleet,
    window_of,
)
from services.worker.domain.backlog import Backlog, QueuedRequest, UnackedDelivery
from services.worker.domain.prefetch import IN_HAND_MS, consumer_prefetch
from tidegate.kernel.protocol import envelope

pytestmark = pytest.mark.unit

CALL_S = 0.010
HOP_S = 0.001
HEARTBEAT_S = 0.5


@dataclass(eq=False)
class Sent:
    """One request, and when it was answered."""

    caller: str
    gateway: int
    at: float
    flow: Flow[Sent]
    answered: float = 0.0


@dataclass
class World:
    """Gateways with lanes, one queue, and replicas that run one request at a time."""

    replicas: int = 2
    gateways: int = 1
    weights: dict[str, int] = field(default_factory=dict)
    fair: bool = True
    now: float = 0.0
    done: list[Sent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = count()
        self.lanes: list[FairLane[Sent]] = [FairLane() for _ in range(self.gateways)]
        self._queue: deque[Sent] = deque()
        self._backlogs = [Backlog() for _ in range(self.replicas)]
        self._by_id: dict[bytes, Sent] = {}
        self._unacked, self._busy = [0] * self.replicas, [False] * self.replicas
        holds = int(IN_HAND_MS / 1e3 / CALL_S)
        self._prefetch = consumer_prefetch(holds)
        for lane in self.lanes:
            fleet = ReplicaFleet(self.replicas, holds=holds * self.replicas, gateways=self.gateways)
            lane.window = window_of(fleet) if self.fair else UNLIMITED
        self.later(HEARTBEAT_S, self._heartbeat)

    def later(self, delay: float, action: Callable[[], None]) -> None:
        heappush(self._events, (self.now + delay, next(self._count), action))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heappop(self._events)
            action()

    def arrive(self, caller: str, gateway: int = 0) -> None:
        lane = self.lanes[gateway]
        flow = lane.flow(FlowKey("m", caller, self.weights.get(caller, 1)))
        sent = Sent(caller, gateway, self.now, flow)
        lane.arrive(flow)
        if lane.take(flow):
            self.later(HOP_S, lambda: self._publish(sent))
        else:
            lane.hold(flow, sent)

    def _publish(self, sent: Sent) -> None:
        self._queue.append(sent)
        self._deliver()

    def _deliver(self) -> None:
        while self._queue and min(self._unacked) < self._prefetch:
            replica = self._unacked.index(min(self._unacked))
            sent = self._queue.popleft()
            self._unacked[replica] += 1
            self.later(HOP_S, partial(self._receive, sent, replica))

    def _receive(self, sent: Sent, replica: int) -> None:
        id_ = next(self._count).to_bytes(16, "big")
        tenant = sent.flow.tenant if self.fair else b""
        frame = envelope.request_frame(id_, 0, 0, b"k", [], tenant=tenant)
        self._by_id[id_] = sent
        item = QueuedRequest(envelope.read_request(frame), UnackedDelivery(None, 0, "", 1), self.now)
        self._backlogs[replica].add(item)
        self._start(replica)

    def _start(self, replica: int) -> None:
        if not self._busy[replica] and len(self._backlogs[replica]):
            (item,) = self._backlogs[replica].take(0)
            self._busy[replica] = True
            self.later(CALL_S, lambda: self._end(self._by_id.pop(item.request.id), replica))

    def _end(self, sent: Sent, replica: int) -> None:
        self._busy[replica] = False
        self._unacked[replica] -= 1
        self._start(replica)
        self._deliver()
        self.later(HOP_S, lambda: self._answer(sent))

    def _answer(self, sent: Sent) -> None:
        sent.answered = self.now
        self.done.append(sent)
        lane = self.lanes[sent.gateway]
        lane.settle(sent.flow, published=True)
        for released in lane.release():
            self.later(HOP_S, partial(self._publish, released))

    def _heartbeat(self) -> None:
        loads = [lane.loads(64) for lane in self.lanes]
        for own, lane in enumerate(self.lanes):
            others = [load for gateway, load in enumerate(loads) if gateway != own]
            lane.learn({name: FlowLoad(*each) for load in others for name, each in load.items()})
        self.later(HEARTBEAT_S, self._heartbeat)

    def offer(self, caller: str, rate: float, seconds: float, seed: int = 1, start: float = 0.0) -> None:
        """Let requests of a caller arrive at random times, each at a random gateway."""
        rng, at = random.Random(f"{caller}{seed}"), start
        while (at := at + rng.expovariate(rate)) < start + seconds:
            self.later(at, partial(self.arrive, caller, rng.randrange(self.gateways)))

    def p99(self, caller: str) -> float:
        times = sorted(each.answered - each.at for each in self.done if each.caller == caller)
        assert len(times) >= 100
        return times[int(0.99 * len(times))]

    def served(self, since: float, until: float) -> Counter[str]:
        return Counter(each.caller for each in self.done if since <= each.answered < until)


def _light(world: World, *, flood: bool, paced: bool) -> float:
    """Return the p99 of a light caller, beside a flood of ten times what the replicas can do or alone."""
    if flood:
        world.offer("flood", 10 * world.replicas / CALL_S, 20)
    if paced:
        rng = random.Random(3)
        for number in range(300):
            world.later(number / 20 + rng.uniform(0, 0.01), lambda: world.arrive("light"))
    else:
        world.offer("light", 20, 20)
    world.run(20.5)
    return world.p99("light")


@pytest.mark.parametrize(
    ("replicas", "gateways", "paced"), [(1, 1, True), (4, 1, True), (2, 1, False), (2, 3, False)]
)
def test_a_flood_leaves_the_p99_of_a_light_caller_within_twice_that_of_alone(replicas, gateways, paced):
    alone, beside = (
        _light(World(replicas=replicas, gateways=gateways), flood=flood, paced=paced)
        for flood in (False, True)
    )
    assert beside <= 2 * alone


def test_without_fairness_the_same_flood_delays_the_light_caller_by_seconds():
    world = World(fair=False)
    world.offer("light", 20, 6)
    world.offer("flood", 10 * world.replicas / CALL_S, 6)
    world.run(60)
    assert world.p99("light") > 10


def test_a_flood_alone_uses_the_whole_capacity():
    world = World()
    world.offer("flood", 10 * world.replicas / CALL_S, 5)
    world.run(5)
    capacity = 4 * world.replicas / CALL_S
    assert world.served(1, 5)["flood"] >= 0.99 * capacity


@pytest.mark.parametrize("gateways", [1, 2])
def test_weights_divide_the_capacity(gateways):
    world = World(gateways=gateways, weights={"a": 3})
    for caller in ("a", "b"):
        world.offer(caller, 5 * world.replicas / CALL_S, 10)
    world.run(10)
    served = world.served(2, 10)
    assert served["a"] / served["b"] == pytest.approx(3, rel=0.04)
    assert served.total() >= 0.99 * 8 * world.replicas / CALL_S


def test_nobody_starves_beside_many_floods():
    world = World()
    for number in range(20):
        world.offer(f"flood{number}", 1 / CALL_S, 10)
    world.offer("late", 10, 8, start=2.0)
    world.run(10)
    served = world.served(2, 10)
    fair_share = 8 * world.replicas / CALL_S / 21
    floods = [served[f"flood{number}"] for number in range(20)]
    assert min(floods) > 0.9 * fair_share
    assert max(floods) < 1.1 * fair_share
    assert served["late"] > 0.9 * min(fair_share, 80)


def test_a_caller_that_returns_gets_no_more_than_its_share():
    """An idle caller saves nothing up: after a pause it shares the replicas equally."""
    world = World()
    world.offer("steady", 5 * world.replicas / CALL_S, 10)
    world.offer("returns", 5 * world.replicas / CALL_S, 4, start=6.0)
    world.run(10)
    served = world.served(7, 10)
    assert served["returns"] / served["steady"] == pytest.approx(1, rel=0.04)


def test_requests_of_one_caller_keep_their_order_and_urgent_ones_go_first():
    lane: FairLane[int] = FairLane()
    lane.window = 1
    flow = lane.flow(FlowKey("m", "a"))
    assert lane.take(flow)
    for number, priority in enumerate((7, 0, 0, 1)):
        lane.hold(flow, number, priority)
    order: list[int] = []
    for _ in range(4):
        lane.settle(flow, published=True)
        order += lane.release()
    assert order == [3, 1, 2, 0]


def test_a_caller_within_its_share_is_published_at_once():
    lane: FairLane[int] = FairLane()
    lane.window = 8
    flood, light = lane.flow(FlowKey("m", "flood")), lane.flow(FlowKey("m", "light"))
    for _ in range(20):
        lane.arrive(flood)
        if not lane.take(flood):
            lane.hold(flood, 0)
    assert (lane.published, lane.held, lane.contended(flood)) == (8, 12, False)
    lane.arrive(light)
    assert lane.contended(flood)
    assert lane.share(light) == 0.5
    assert [lane.take(light) for _ in range(5)] == [True] * 4 + [False]


def test_the_window_is_divided_among_gateways():
    def of(holds: int, ready: int, gateways: int) -> int:
        return window_of(ReplicaFleet(ready, holds=holds, gateways=gateways))

    assert [of(20, 2, 1), of(20, 2, 4), of(1, 1, 9)] == [20, 5, 1]
    assert of(0, 2, 1) == window_of(UNKNOWN_FLEET) == UNLIMITED  # workers of an earlier version
    assert of(0, 0, 1) == of(99, 0, 1) == STARTING_WINDOW


def test_the_answer_times_of_a_flood_have_no_gaps():
    world = World(replicas=1)
    world.offer("flood", 10 / CALL_S, 3)
    world.run(3)
    times = sorted(each.answered for each in world.done)
    assert max(b - a for a, b in pairwise(times)) < 2 * CALL_S


def test_failures_while_requests_are_released_do_not_nest():
    """A broker that takes no message fails each request of a language model in the call that publishes it."""
    lane: FairLane[int] = FairLane()
    lane.window = 1
    flow = lane.flow(FlowKey("m", "a"))
    for number in range(5_000):
        lane.arrive(flow)
        if not lane.take(flow):
            lane.hold(flow, number)
    failed: list[int] = []

    def fail() -> None:
        lane.settle(flow, published=True)
        for number in lane.release():
            failed.append(number)
            fail()

    fail()
    assert failed == list(range(1, 5_000))
    assert (lane.held, lane.published, flow.outstanding) == (0, 0, 0)
