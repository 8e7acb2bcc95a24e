"""Count the seconds in which a replica had requests and finished none. Pure.

Requests wait in a shared queue, so a stalled replica delays only the few requests that it has received.
Counts of slow requests hardly show such a stall, but counts of stalled seconds do. Only models with quick
calls are judged, because one normal call of a slow model may take seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from services.router.domain.evidence import Tick
from tidegate.kernel.protocol.presence import ReplicaReport

# A model is judged only if the mean time of its calls is below this (milliseconds).
QUICK_MS = 200.0


class Reading(NamedTuple):
    """A replica's numbers at one moment: requests in flight, and requests finished so far."""

    inflight: int
    done: int


def readings(reports: Iterable[ReplicaReport], deployments: frozenset[str]) -> dict[str, Reading]:
    """Return the readings of these Deployments' ready replicas, by replica.

    Replicas with slow calls are left out, and also replicas whose model answers with streams.
    """
    return {
        report.replica: Reading(report.inflight, report.completed + report.failed)
        for report in reports
        if report.deployment in deployments
        and report.state == "ready"
        and report.call_ms is not None
        and report.call_ms < QUICK_MS
        and not (report.signature or {}).get("decoupled")
    }


def stalled(before: Mapping[str, Reading], now: Mapping[str, Reading]) -> tuple[int, int]:
    """Return how many replicas had requests between two readings, and how many of them finished nothing."""
    pairs = [(old, now[name]) for name, old in before.items() if name in now]
    busy = [(old, new) for old, new in pairs if old.inflight or new.done != old.done]
    return len(busy), sum(new.inflight > 0 and new.done == old.done for old, new in busy)


def tick_of(canary: tuple[int, int], base: tuple[int, int]) -> Tick | None:
    """Return the counts of one second as a tick; None if canary or baseline had no busy replica.

    ``canary``, ``base``: the number of busy replicas, and how many of them stalled.
    """
    if not canary[0] or not base[0]:
        return None
    return Tick(canary[0], canary[1], base[0], base[1])
