"""A queue and its replicas, in simulated time: first come, first served, by whoever is free.

Event by event, exact to the request: a call takes what waits up to the batch, and lasts as long as the model.
What may still change (who is there to take a request) is only settled up to the next look.
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
    """What a replica is like. Times in ms; ``deadline_s``: nobody waits for longer, what does is not run.

    A call takes ``call_ms``, plus ``row_ms`` for each request after the first; ``spread`` is the share by
    which calls differ. ``batch`` requests share a call at most. A start takes ``start_s`` seconds.
    """

    call_ms: float
    row_ms: float = 0.0
    batch: int = 1
    spread: float = 0.0
    start_s: float = 5.0
    deadline_s: float = 30.0


@dataclass(slots=True)
class Server:
    """One replica: free again at ``free_at``; what its last call counts becomes visible when it is over."""

    running: Running
    ready_at: float
    free_at: float
    completed: int = 0
    busy_ms: float = 0.0
    calls: int = 0
    under_way: int = 0
    call_ms: float = 0.0
    draining: bool = False
    gone_at: float | None = None

    def settle(self, now: float) -> None:
        """Count the last call if it is over at ``now``."""
        if self.under_way and self.free_at <= now:
            self.completed += self.under_way
            self.busy_ms += self.call_ms
            self.calls += 1
            self.under_way = 0


@dataclass(slots=True)
class SimulatedFleet:
    """The queue in front of the replicas. Of every request served ``arrivals`` has the time and ``waits`` the
    wait in ms; ``expired`` are the times of those that waited for too long, ``replica_s`` what was paid for.
    """

    service: ReplicaTiming
    seed: int = 0
    servers: dict[str, Server] = field(default_factory=dict)
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
        """Start a replica: it serves after its start time."""
        ready = now + self.service.start_s
        self.servers[running.replica] = Server(running, ready, ready)

    def ready(self, running: Running, now: float) -> None:
        """Have a replica there that serves already."""
        self.servers[running.replica] = Server(running, now, now)

    def drain(self, replica: str, now: float) -> None:
        """Let a replica finish its call and go."""
        server = self.servers[replica]
        server.draining = True
        server.running = replace(server.running, draining_since=now)
        if server.ready_at > now:
            server.free_at = now  # it does not serve yet: it just goes

    def kill(self, replica: str) -> None:
        """Forget a replica."""
        self.servers.pop(replica, None)

    def advance(self, arrivals: Iterable[float], now: float, until: float) -> None:
        """Let time pass from ``now`` to ``until``, with these arrivals in between."""
        before = len(self.queue)
        self.queue.extend(arrivals)
        self.arrived += len(self.queue) - before
        serving = [(s.free_at, place, s) for place, s in enumerate(self.servers.values()) if not s.draining]
        heapq.heapify(serving)
        while self.queue and serving:
            _, place, server = serving[0]
            if not self._serve(server, until):
                break
            heapq.heapreplace(serving, (server.free_at, place, server))
        for server in self.servers.values():
            server.settle(until)
            end = until if not server.draining else min(until, max(now, server.free_at))
            self.replica_s += max(0.0, end - max(now, server.running.launched_at))
            if server.draining and server.free_at <= until and server.gone_at is None:
                server.gone_at = max(now, min(server.free_at, until))

    def outstanding(self) -> int:
        """Requests that wait or run."""
        return len(self.queue) + sum(server.under_way for server in self.servers.values())

    def _serve(self, server: Server, until: float) -> bool:
        """The next call of ``server``, if it begins before ``until``."""
        begin = max(server.free_at, self.queue[0])
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
            server.call_ms = (self.service.call_ms + self.service.row_ms * (taken - 1)) * varied
            server.under_way, server.free_at = taken, begin + server.call_ms / 1000.0
        return True
