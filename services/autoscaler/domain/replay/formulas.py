"""The published formulas of two other autoscalers, with their documented defaults (ADR 032).

KEDA with the Kubernetes HPA, as described in keda.sh/docs ("Scaling Deployments") and kubernetes.io/docs
("Horizontal Pod Autoscaling", "Algorithm details" and "Default behavior"). The result is ceil(queue / value).
It is computed every 15 s, or every 30 s at zero replicas. A change by a tenth or less is not made. In 15 s,
scaling up adds at most 4 replicas or at most 100 %, whichever is more. Scaling down stops at the largest
result of the last 300 s. Scale to zero follows 300 s after the queue became empty.

Knative's KPA, as described in knative.dev/docs ("Additional autoscaling configuration for the KPA"). Every 2
s, the result is ceil(concurrency / target). The concurrency is the mean number of unanswered requests over 60
s; in a panic, it is the mean over 6 s. A panic begins if the result over 6 s is at least twice the number of
ready replicas. It ends 60 s after the last such result. In a panic, no replica is removed. Scaling down
removes at most half of the replicas at a time. When the result is 0, scale to zero follows after another 30
s.

Both formulas observe the same queue as ``decide``: requests that wait and requests that run. In production,
they would observe the queue with a delay.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class FleetView(NamedTuple):
    """The fleet at time ``now`` (seconds): unanswered requests, ready replicas, and the current target."""

    now: float
    outstanding: int
    ready: int
    current: int


class Formula(Protocol):
    """The interface of formulas. Between its evaluations, a formula returns the current target."""

    def desired(self, view: FleetView) -> int:
        """Return the desired replicas, without bounds."""


@dataclass(slots=True)
class Keda:
    """The formula of KEDA with the HPA; ``value`` is the desired number of messages per replica."""

    value: float
    sync_s: float = 15.0
    poll_s: float = 30.0
    tolerance: float = 0.1
    down_window_s: float = 300.0
    cooldown_s: float = 300.0
    _next: float = 0.0
    _active_at: float = 0.0
    _results: deque[tuple[float, int]] = field(default_factory=deque)

    def desired(self, view: FleetView) -> int:
        """Return the desired replicas: KEDA switches between 0 and 1, and the HPA chooses higher numbers."""
        now, current = view.now, view.current
        if not self._active_at:
            self._active_at = now
        if view.outstanding:
            self._active_at = now
        if now < self._next:
            return current
        self._next = now + (self.sync_s if current else self.poll_s)
        if current == 0:
            return 1 if view.outstanding else 0
        if now - self._active_at >= self.cooldown_s:
            return 0
        ratio = view.outstanding / (self.value * current)
        desired = current if abs(ratio - 1.0) <= self.tolerance else math.ceil(view.outstanding / self.value)
        self._results.append((now, desired))
        while self._results[0][0] <= now - self.down_window_s:
            self._results.popleft()
        if desired > current:
            return min(desired, max(current + 4, current * 2))
        return max(1, min(current, max(n for _, n in self._results)))


@dataclass(slots=True)
class Knative:
    """The formula of Knative's KPA; ``target`` is the wanted number of unanswered requests per replica."""

    target: float
    tick_s: float = 2.0
    stable_s: float = 60.0
    panic_s: float = 6.0
    panic_threshold: float = 2.0
    down_rate: float = 2.0
    grace_s: float = 30.0
    _next: float = 0.0
    _panic_at: float | None = None
    _most: int = 0
    _idle_at: float | None = None
    _samples: deque[tuple[float, int]] = field(default_factory=deque)

    def desired(self, view: FleetView) -> int:
        """Return the desired replicas."""
        now, ready = view.now, max(1, view.ready)
        self._samples.append((now, view.outstanding))
        while self._samples[0][0] <= now - self.stable_s:
            self._samples.popleft()
        if now < self._next:
            return view.current
        self._next = now + self.tick_s
        stable = math.ceil(self._mean(now - self.stable_s) / self.target)
        sudden = math.ceil(self._mean(now - self.panic_s) / self.target)
        least = math.floor(ready / self.down_rate)
        if sudden / ready >= self.panic_threshold:
            self._panic_at = now
        elif self._panic_at is not None and now - self._panic_at > self.stable_s:
            self._panic_at, self._most = None, 0
        desired = max(stable, least)
        if self._panic_at is not None:
            self._most = max(self._most, desired, sudden)
            desired = self._most
        return self._or_zero(desired if stable or self._panic_at is not None else stable, now, view)

    def _or_zero(self, desired: int, now: float, view: FleetView) -> int:
        if desired > 0 or view.outstanding:
            self._idle_at = None
            return max(1, desired)
        self._idle_at = self._idle_at or now
        return 0 if now - self._idle_at >= self.grace_s else min(1, view.current)

    def _mean(self, since: float) -> float:
        values = [n for at, n in self._samples if at > since]
        return sum(values) / len(values) if values else 0.0
