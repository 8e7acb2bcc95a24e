"""How long a replica took from the decision to launch it until it was ready, and where the time went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import median
from typing import Any

from services.autoscaler.domain.memory import STARTS_KEPT, State
from services.autoscaler.domain.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Milliseconds; ``phases_ms`` are the worker's: launch, fetch, triton_start, load, warm_up.

    ``total_ms`` runs from the decision to the first look that saw the replica ready, so it is late
    by up to the time between two looks and one heartbeat. ``warm``: a worker of the warm pool became it.
    """

    replica: str
    deployment: str
    at: float
    total_ms: float
    phases_ms: dict[str, float] = field(default_factory=dict)
    cause: str = ""
    warm: bool = False

    def view(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def cold_starts(
    before: State, after: State, snapshot: Snapshot, causes: Mapping[str, str], now: float
) -> Iterable[ColdStart]:
    """The replicas that became ready between ``before`` and ``after``.

    ``causes`` are those of the replicas that this process launched: another one that was already ready
    when it was first seen was adopted, and nobody knows since when it is ready.
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
    """Seconds that earlier replicas took, as ``State.starts`` has them; ``views`` are newest first."""
    took = (view["total_ms"] - view["phases_ms"].get("environment", 0.0) for view in views)
    return tuple(ms / 1000.0 for ms in islice(took, STARTS_KEPT))


def report(deployment: str, views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The known cold starts of a Deployment in one line: the median and the longest, and the median parts."""
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
