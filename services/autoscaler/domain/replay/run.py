"""Replay arrivals under one controller, round by round, and summarize the outcome."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from services.autoscaler.domain.replay.controllers import Controller
from services.autoscaler.domain.replay.fleet import ReplicaTiming, SimulatedFleet

POINTS = 400


@dataclass(frozen=True, slots=True)
class FleetSample:
    """The fleet after one round; ``at`` is in seconds from the start."""

    at: float
    backlog: int
    ready: int
    target: int


@dataclass(slots=True)
class ReplayOutcome:
    """The outcome of one controller. Times are in seconds from the start, ``waits`` in ms."""

    name: str
    samples: list[FleetSample] = field(default_factory=list)
    arrivals: array[float] = field(default_factory=lambda: array("d"))
    waits: array[float] = field(default_factory=lambda: array("d"))
    expired: array[float] = field(default_factory=lambda: array("d"))
    left: int = 0
    replica_s: float = 0.0
    decisions: list[Any] = field(default_factory=list)


def replay(
    arrivals: Sequence[float],
    controller: Controller,
    service: ReplicaTiming,
    *,
    seconds: float,
    start_at: float = 0.0,
    period_s: float = 0.5,
    seed: int = 0,
) -> ReplayOutcome:
    """Return the outcome of ``arrivals`` (sorted seconds from the start) under ``controller``.

    ``start_at`` is the start in seconds since the epoch, for schedules and forecasts.
    """
    fleet, found = SimulatedFleet(service, seed), ReplayOutcome(controller.name)
    times = [start_at + at for at in arrivals]
    controller.begin(fleet, start_at)
    place, rounds = 0, math.ceil(seconds / period_s)
    for number in range(rounds):
        now = start_at + number * period_s
        controller.round(fleet, now)
        until = now + period_s
        end = bisect_left(times, until, place)
        fleet.advance(times[place:end], now, until)
        place = end
        ready = sum(s.ready_at <= until and not s.draining for s in fleet.servers.values())
        found.samples.append(FleetSample(until - start_at, fleet.outstanding(), ready, controller.target))
    found.arrivals = array("d", (at - start_at for at in fleet.arrivals))
    found.expired = array("d", (at - start_at for at in fleet.expired))
    found.waits, found.left, found.replica_s = fleet.waits, len(fleet.queue), fleet.replica_s
    found.decisions = controller.decisions
    return found


def summary(outcome: ReplayOutcome, target_wait_ms: float, price_per_hour: float | None) -> dict[str, Any]:
    """Return the figures of an outcome: waits in ms, late requests, replica-hours, changes of the target."""
    waits = sorted(outcome.waits)
    late = len(waits) - bisect_left(waits, target_wait_ms + 1e-9)
    served = len(waits)
    gone = len(outcome.expired)
    targets = [sample.target for sample in outcome.samples]
    steps = [b - a for a, b in pairwise(targets) if b != a]
    hours = outcome.replica_s / 3600.0
    return {
        "name": outcome.name,
        "requests": served + gone + outcome.left,
        "served": served,
        "expired": gone,
        "unserved": outcome.left,
        "late": late + gone,
        "late_share": (late + gone) / max(1, served + gone),
        "wait_p50_ms": percentile(waits, 50),
        "wait_p95_ms": percentile(waits, 95),
        "wait_p99_ms": percentile(waits, 99),
        "wait_max_ms": waits[-1] if waits else 0.0,
        "replica_hours": hours,
        "cost": None if price_per_hour is None else hours * price_per_hour,
        "most_replicas": max(targets, default=0),
        "changes": len(steps),
        "reversals": sum((a > 0) != (b > 0) for a, b in pairwise(steps)),
    }


def timeline(outcome: ReplayOutcome, seconds: float, points: int = POINTS) -> dict[str, list[float]]:
    """Return an outcome over time, in at most ``points`` buckets: arrivals, backlog, replicas, waits."""
    width = max(seconds / points, 0.5)
    count = math.ceil(seconds / width)
    came = [0] * count
    waits: list[list[float]] = [[] for _ in range(count)]
    for at, wait in zip(outcome.arrivals, outcome.waits, strict=True):
        bucket = min(count - 1, int(at / width))
        came[bucket] += 1
        waits[bucket].append(wait)
    for at in outcome.expired:
        came[min(count - 1, int(at / width))] += 1
    last: list[FleetSample | None] = [None] * count
    most = [0] * count
    for sample in outcome.samples:
        bucket = min(count - 1, int(sample.at / width))
        last[bucket] = sample
        most[bucket] = max(most[bucket], sample.backlog)
    kept = FleetSample(0.0, 0, 0, 0)
    found: dict[str, list[float]] = {
        "at": [], "arrivals": [], "backlog": [], "ready": [], "target": [], "wait_p95_ms": []
    }  # fmt: skip
    for bucket in range(count):
        kept = last[bucket] or kept
        found["at"].append(bucket * width)
        found["arrivals"].append(came[bucket] / width)
        found["backlog"].append(float(most[bucket]))
        found["ready"].append(float(kept.ready))
        found["target"].append(float(kept.target))
        found["wait_p95_ms"].append(percentile(sorted(waits[bucket]), 95))
    return found


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the percentile of ordered values; 0 if there are none."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * percent / 100) - 1)]
