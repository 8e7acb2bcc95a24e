"""The published formulas of two others, beside ours: what they would want, with their documented defaults.

KEDA with the Kubernetes HPA, after keda.sh/docs ("Scaling Deployments") and kubernetes.io/docs ("Horizontal
Pod Autoscaling", "Algorithm details" and "Default behavior"): looked at every 15 s (from zero: 30 s), desired
= ceil(queue / value), nothing within a tenth of it; up by at most 4 or 100 % in 15 s, down to the largest
wish of the last 300 s; to zero 300 s after the last message.

Knative's KPA, after knative.dev/docs ("Additional autoscaling configuration for the KPA"): every 2 s,
ceil(concurrency / target) of the mean over 60 s, or over 6 s in a panic, which begins at twice what is ready,
takes nothing away, and ends 60 s after that; down by at most half at a time, to zero after 30 s more.

Both look at the same queue as ours, requests that wait and that run, though they would see it later.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class FleetView(NamedTuple):
    """One look: the time (seconds), requests that wait or run, replicas that are ready, and the last wish."""

    now: float
    outstanding: int
    ready: int
    current: int


class Formula(Protocol):
    """From looks to replicas; it is asked at every look and answers the last wish between its own."""

    def desired(self, seen: FleetView) -> int:
        """How many replicas it wants now, unbounded."""


@dataclass(slots=True)
class Keda:
    """``value``: messages for each replica."""

    value: float
    sync_s: float = 15.0
    poll_s: float = 30.0
    tolerance: float = 0.1
    down_window_s: float = 300.0
    cooldown_s: float = 300.0
    _next: float = 0.0
    _active_at: float = 0.0
    _wishes: deque[tuple[float, int]] = field(default_factory=deque)

    def desired(self, seen: FleetView) -> int:
        """How many replicas the HPA wants, and KEDA between none and one."""
        now, current = seen.now, seen.current
        if not self._active_at:
            self._active_at = now
        if seen.outstanding:
            self._active_at = now
        if now < self._next:
            return current
        self._next = now + (self.sync_s if current else self.poll_s)
        if current == 0:
            return 1 if seen.outstanding else 0
        if now - self._active_at >= self.cooldown_s:
            return 0
        ratio = seen.outstanding / (self.value * current)
        wish = current if abs(ratio - 1.0) <= self.tolerance else math.ceil(seen.outstanding / self.value)
        self._wishes.append((now, wish))
        while self._wishes[0][0] <= now - self.down_window_s:
            self._wishes.popleft()
        if wish > current:
            return min(wish, max(current + 4, current * 2))
        return max(1, min(current, max(n for _, n in self._wishes)))


@dataclass(slots=True)
class Knative:
    """``target``: requests for each replica, what waits included."""

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

    def desired(self, seen: FleetView) -> int:
        """How many replicas the KPA wants."""
        now, ready = seen.now, max(1, seen.ready)
        self._samples.append((now, seen.outstanding))
        while self._samples[0][0] <= now - self.stable_s:
            self._samples.popleft()
        if now < self._next:
            return seen.current
        self._next = now + self.tick_s
        stable = math.ceil(self._mean(now - self.stable_s) / self.target)
        sudden = math.ceil(self._mean(now - self.panic_s) / self.target)
        least = math.floor(ready / self.down_rate)
        if sudden / ready >= self.panic_threshold:
            self._panic_at = now
        elif self._panic_at is not None and now - self._panic_at > self.stable_s:
            self._panic_at, self._most = None, 0
        wish = max(stable, least)
        if self._panic_at is not None:
            self._most = max(self._most, wish, sudden)
            wish = self._most
        return self._or_zero(wish if stable or self._panic_at is not None else stable, now, seen)

    def _or_zero(self, wish: int, now: float, seen: FleetView) -> int:
        if wish > 0 or seen.outstanding:
            self._idle_at = None
            return max(1, wish)
        self._idle_at = self._idle_at or now
        return 0 if now - self._idle_at >= self.grace_s else min(1, seen.current)

    def _mean(self, since: float) -> float:
        values = [n for at, n in self._samples if at > since]
        return sum(values) / len(values) if values else 0.0
