"""Measure cold starts in total and by phase.

A cold start lasts from the decision to launch a replica until the replica is ready.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import median
from typing import Any

from services.autoscaler.domain.memory import STARTS_KEPT, State
from services.autoscaler.domain.snapshot import Snapshot

# The next start is expected to take as long as the slowest of this many recent starts.
STARTS_COUNTED = 3


@dataclass(frozen=True, slots=True)
class ColdStart:
    """The cold start of one replica, in milliseconds.

    ``phases_ms`` has the durations that the worker measured, by phase: launch, environment, fetch,
    triton_start, load, warm_up. ``total_ms`` ends when a round of the autoscaler sees the replica ready. So
    it may be too long, by at most one round and one heartbeat. ``warm`` is True if a worker of the warm pool
    became the replica.
    """

    replica: str
    deployment: str
    at: float
    total_ms: float
    phases_ms: dict[str, float] = field(default_factory=dict)
    cause: str = ""
    warm: bool = False

    def view(self) -> dict[str, Any]:
        """Return the cold start for JSON."""
        return asdict(self)


def cold_starts(
    before: State, after: State, snapshot: Snapshot, causes: Mapping[str, str], now: float
) -> Iterable[ColdStart]:
    """Yield the cold starts of replicas that became ready between the states ``before`` and ``after``.

    ``causes`` has the cause of each launch by this process. A replica that an earlier process launched may
    already be ready when this process first sees it. Such a replica is left out, because the time at which it
    became ready is not known.
    """
    for running in snapshot.running or ():
        was, memory = before.replicas.get(running.replica), after.replicas.get(running.replica)
        if memory is None or memory.ready_at is None or (was is not None and was.ready_at is not None):
            continue
        if was is None and running.replica not in causes:
            continue
        report = (snapshot.reports or {}).get(running.replica)
        phases = dict(report.phases_ms) if report else {}
        total = (now - running.launched_at) * 1000.0
        cause = causes.get(running.replica, "")
        warm = bool(running.worker)
        yield ColdStart(running.replica, running.deployment, now, total, phases, cause, warm)


def start_times(views: Iterable[Mapping[str, Any]]) -> tuple[float, ...]:
    """Return how many seconds each earlier start took, newest first, for ``State.starts``.

    ``views`` are cold starts as :meth:`ColdStart.view` returns them, newest first. The phase ``environment``
    does not count, because later starts find the environment in the host's cache.
    """
    took = (view["total_ms"] - view["phases_ms"].get("environment", 0.0) for view in views)
    return tuple(ms / 1000.0 for ms in islice(took, STARTS_KEPT))


def start_time(state: State, deployment: str) -> float | None:
    """Return how long the next start of a replica is expected to take, in seconds; None if nothing is known.

    Before the first start, this is the time that the start of the version's scratch replica took.
    """
    measured = max(state.starts.get(deployment, ())[:STARTS_COUNTED], default=None)
    return state.first_starts.get(deployment) if measured is None else measured


def report(deployment: str, views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a summary of a Deployment's cold starts: median, longest, and the median of each phase."""
    totals = [view["total_ms"] for view in views]
    names = dict.fromkeys(name for view in views for name in view["phases_ms"])
    parts = {name: [v["phases_ms"][name] for v in views if name in v["phases_ms"]] for name in names}
    return {
        "deployment": deployment,
        "count": len(views),
        "median_ms": median(totals) if totals else None,
        "longest_ms": max(totals, default=None),
        "phases_ms": {name: median(values) for name, values in parts.items()},
        "last": dict(views[0]) if views else None,
    }
