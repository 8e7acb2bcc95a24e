"""The error budgets of an endpoint's objectives: the share that is left, and the burn rates. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from services.router.domain.alerts.facts import DAY, HOUR, Counts, totals
from services.router.domain.watch.history import EndpointHistory
from tidegate.kernel.protocol.service_level import ServiceLevel

# Windows for which burn rates are reported, in seconds.
SHOWN = {"1h": HOUR, "6h": 6 * HOUR, "3d": 3 * DAY}


def error_budgets(
    endpoint: str, slo: ServiceLevel, history: EndpointHistory, now: float
) -> Iterator[dict[str, Any]]:
    """Yield one document for each objective.

    ``left``: the share of the budget that is left; negative if the budget is exceeded. A burn rate of 1 uses
    up the budget exactly in the objective's window. Without requests, these numbers are None.
    """
    counts = totals(history, now, (*SHOWN.values(), slo.window_s))
    for objective, target in _targets(slo):
        bad = {seconds: _bad(each, objective) for seconds, each in counts.items()}
        allowed = 1 - target / 100
        all_, spent = counts[slo.window_s].requests, bad[slo.window_s]
        yield {
            "endpoint": endpoint,
            "objective": objective,
            "target": target,
            "latency_ms": slo.latency_ms if objective == "latency" else None,
            "window": slo.window,
            "requests": all_,
            "bad": spent,
            "attained": 100 * (1 - spent / all_) if all_ else None,
            "left": 1 - spent / all_ / allowed if all_ else None,
            "burn": {
                name: bad[seconds] / counts[seconds].requests / allowed if counts[seconds].requests else None
                for name, seconds in SHOWN.items()
            },
        }


def _targets(slo: ServiceLevel) -> Iterator[tuple[str, float]]:
    if slo.availability is not None:
        yield "availability", slo.availability
    if slo.latency_ms is not None:
        yield "latency", slo.latency_target


def _bad(counts: Counts, objective: str) -> int:
    return counts.failed if objective == "availability" else min(counts.requests, counts.failed + counts.slow)
