"""The live numbers and the history of endpoints as documents. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.router.domain.watch.history import EndpointHistory
from services.router.domain.watch.readings import deployments_of
from services.router.domain.watch.window import Window
from tidegate.kernel.protocol.models import Endpoint

LIVE_S = 30.0


def live(
    endpoint: Endpoint, history: EndpointHistory, statuses: Sequence[Mapping[str, Any]], now: float
) -> dict[str, Any]:
    """Return the numbers of an endpoint's last 30 s. A number is None if it is not known."""
    window = history.recent(LIVE_S, now)
    queues = [status["queue"] for status in statuses if status.get("queue") is not None]
    costs = [status["cost_per_hour"] for status in statuses if status.get("cost_per_hour") is not None]
    return {
        "endpoint": endpoint.name,
        "deployments": deployments_of(endpoint),
        "rate": window.rate,
        "p50_ms": _ms(window.quantile_s(0.5)),
        "p99_ms": _ms(window.quantile_s(0.99)),
        "error_rate": window.error_rate if window.requests else None,
        "queue": sum(queues) if queues else None,
        "queue_age_s": window.queue_age_s,
        "utilization": window.utilization,
        "ready": sum(status.get("ready", 0) for status in statuses),
        "desired": sum(status.get("desired", 0) for status in statuses),
        "starting": sum(status.get("starting", 0) for status in statuses),
        "why": "; ".join(filter(None, (str(status.get("reason", "")) for status in statuses))),
        "callers_today": history.ticks[-1].callers if history.ticks else 0,
        "cost_per_hour": sum(costs) if costs else None,
    }


def point(window: Window) -> dict[str, Any]:
    """Return one window of the history as a document."""
    replicas = {
        name: {"requests": work.requests, "call_ms": work.mean_call_ms, "batch": work.mean_batch}
        for name, work in window.replicas.items()
    }
    return {
        "start": window.start,
        "end": window.end,
        "requests": window.requests,
        "failed": window.failed,
        "outcomes": window.outcomes,
        "deployments": window.answered_by,
        "p50_ms": _ms(window.quantile_s(0.5)),
        "p95_ms": _ms(window.quantile_s(0.95)),
        "p99_ms": _ms(window.quantile_s(0.99)),
        "ledger_ms": window.ledger_ms(),
        "callers": window.callers,
        "replica_s": window.replica_s,
        "utilization": window.utilization,
        "queue": window.queue,
        "queue_age_s": window.queue_age_s,
        "restarts": window.restarts,
        "dead_letters": window.dead,
        "replicas": replicas,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
