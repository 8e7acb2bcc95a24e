"""Simulate a queue and its replicas: the first request goes to the first free replica.

Each request is simulated exactly. A call takes waiting requests, at most as many as the batch size. It lasts
as long as a call of the model. Each step of the simulation ends at the next round, because a round may change
the replicas.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from services.autoscaler.domain.launcher import Running


@dataclass(frozen=True, slots=True)
class ReplicaTiming:
    """The speed and the limits of a simulated replica.

    A call takes ``call_ms``, plus ``row_ms`` for each request after the first. This time is multiplied by a
    random factor from 1 - ``spread`` to 1 + ``spread``. At most ``batch`` requests share a call. A start
    takes ``start_s`` seconds. A request that waited longer than ``deadline_s`` expires. ``slots`` calls run
    at the same time, as in a language model's engine. Each request has ``prompt_tokens`` prompt tokens.
    """

    call_ms: float
    row_ms: float = 0.0
    batch: int = 1
    spread: float = 0.0
    start_s: float = 5.0
    deadline_s: float = 30.0
    slots: int = 1
    prompt_tokens: int = 0


@dataclass(slots=True)
class SimulatedSlot:
    """A simulated slot, which runs one call at a time.

    ``free_at``: when its last call is over. ``under_way``: the number of requests in that call; 0 after the
    call is counted.
    """

    free_at: float
    under_way: int = 0
    call_ms: float = 0.0


@dataclass(slots=True)
class SimulatedReplica:
    """A simulated replica. Its totals include the last call of a slot only after this call is over."""

    running: Running
    ready_at: float
    slots: list[SimulatedSlot]
    completed: int = 0
    busy_ms: float = 0.0
    calls: int = 0
    draining: bool = False
    gone_at: float | None = None

    @property
    def free_at(self) -> float:
        """Return the time at which the replica's last call is over."""
        return max(slot.free_at for slot in self.slots)

    @property
    def under_way(self) -> int:
        """Return the number of requests in the replica's calls."""
        return sum(slot.under_way for slot in self.slots)

    def settle(self, now: float) -> None:
        """Count the calls that are over at ``now``."""
        for slot in self.slots:
            if slot.under_way and slot.free_at <= now:
                self.completed += slot.under_way
                self.busy_ms += slot.call_ms
                self.calls += 1
                slot.under_way = 0


@dataclass(slots=True)
class SimulatedFleet:
    """The queue and the simulated replicas.

    ``arrivals`` has the arrival time of every served request, and ``waits`` has its wait in ms. ``expired``
    has the arrival times of the expired requests. ``replica_s`` is the number of seconds for which replicas
    existed, summed over all replicas.
    """

    service: ReplicaTiming
    seed: int = 0
    servers: dict[str, SimulatedReplica] = field(default_factory=dict)
    queue: deque[float] = field(default_factory=deque)
    arrivals: array[float] = field(default_factory=lambda: array("d"))
    waits: array[float] = field(default_factory=lambda: array("d"))
    expired: array[float] = field(default_factory=lambda: array("d"))
    arrived: int = 0
    replica_s: float = 0.0
    _draw: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)

    def launch(self, running: Running, now: float) -> None:
        """Start a replica. It is ready after ``service.start_s`` seconds."""
        self.ready(running, now + self.service.start_s)

    def ready(self, running: Running, now: float) -> None:
        """Add a replica that is ready at ``now``."""
        slots = [SimulatedSlot(now) for _ in range(self.service.slots)]
        self.servers[running.replica] = SimulatedReplica(running, now, slots)

    def drain(self, replica: str, now: float) -> None:
        """Drain a replica: it finishes its calls and ends."""
        server = self.servers[replica]
        server.draining = True
        server.running = replace(server.running, draining_since=now)
        if server.ready_at > now:
            server.slots = [SimulatedSlot(now)]  # it is not ready yet, so it ends immediately

    def kill(self, replica: str) -> None:
        """Remove a replica."""
        self.servers.pop(replica, None)

    def advance(self, arrivals: Iterable[float], now: float, until: float) -> None:
        """Advance the simulation from ``now`` to ``until``.

        ``arrivals``: the arrival times in this period.
        """
        before = len(self.queue)
        self.queue.extend(arrivals)
        self.arrived += len(self.queue) - before
        open_ = (server for server in self.servers.values() if not server.draining)
        slots = [(slot, server) for server in open_ for slot in server.slots]
        serving = [(slot.free_at, place, slot, server) for place, (slot, server) in enumerate(slots)]
        heapq.heapify(serving)
        while self.queue and serving:
            _, place, slot, server = serving[0]
            if not self._serve(slot, server, until):
                break
            heapq.heapreplace(serving, (slot.free_at, place, slot, server))
        for server in self.servers.values():
            server.settle(until)
            end = until if not server.draining else min(until, max(now, server.free_at))
            self.replica_s += max(0.0, end - max(now, server.running.launched_at))
            if server.draining and server.free_at <= until and server.gone_at is None:
                server.gone_at = max(now, min(server.free_at, until))

    def outstanding(self) -> int:
        """Return the number of requests that wait or run."""
        return len(self.queue) + sum(server.under_way for server in self.servers.values())

    def _serve(self, slot: SimulatedSlot, server: SimulatedReplica, until: float) -> bool:
        """Run the next call in ``slot`` of ``server``, and return True.

        If the call would begin at ``until`` or later, do not run it and return False.
        """
        begin = max(slot.free_at, self.queue[0])
        if begin >= until:
            return False
        while self.queue and begin - self.queue[0] > self.service.deadline_s:
            self.expired.append(self.queue.popleft())
        taken = 0
        while self.queue and taken < self.service.batch and self.queue[0] <= begin:
            arrived = self.queue.popleft()
            self.arrivals.append(arrived)
            self.waits.append((begin - arrived) * 1000.0)
            taken += 1
        if taken:
            server.settle(begin)
            spread = self.service.spread
            varied = 1.0 + (self._draw.uniform(-spread, spread) if spread else 0.0)
            slot.call_ms = (self.service.call_ms + self.service.row_ms * (taken - 1)) * varied
            slot.under_way, slot.free_at = taken, begin + slot.call_ms / 1000.0
        return True
