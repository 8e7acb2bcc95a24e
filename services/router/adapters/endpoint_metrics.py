"""The metrics of endpoints. The alert rules for Prometheus read them. Only the leader exports them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import Counter, Gauge

from services.router.domain.alerts.alert_rules import limits_of
from services.router.domain.alerts.facts import Facts
from services.router.domain.alerts.states import Alert
from services.router.domain.watch.window import Window

REQUESTS = Counter(
    "tidegate_endpoint_requests_total",
    "Requests that were answered, or failed because of the service.",
    ["endpoint"],
)
FAILED = Counter(
    "tidegate_endpoint_failed_total", "Requests that failed because of the service.", ["endpoint"]
)
LATE = Counter(
    "tidegate_endpoint_late_total", "Requests that failed, or took longer than the objective.", ["endpoint"]
)
P99 = Gauge(
    "tidegate_endpoint_p99_seconds", "The 99th percentile of response times in 5 minutes.", ["endpoint"]
)
QUEUE_AGE = Gauge(
    "tidegate_endpoint_queue_age_seconds", "How long a new request waits for a replica.", ["endpoint"]
)
DEAD = Gauge("tidegate_endpoint_dead_letters_recent", "Dead letters of the last 15 minutes.", ["endpoint"])
RESTARTS = Gauge(
    "tidegate_endpoint_restarts_recent",
    "Unexpected ends of replicas and models in the last 15 minutes.",
    ["endpoint"],
)
LIMIT = Gauge("tidegate_endpoint_alert_limit", "The limit of an alert rule.", ["endpoint", "rule"])
BUDGET = Gauge(
    "tidegate_endpoint_slo_budget",
    "The share of requests that may fail or be slow.",
    ["endpoint", "objective"],
)
DAYS = Gauge("tidegate_endpoint_slo_days", "The window of the objectives in days.", ["endpoint"])
FINDING = Gauge(
    "tidegate_endpoint_finding", "1 while another part of Tidegate reports a finding.", ["endpoint", "rule"]
)
STATE = Gauge("tidegate_alerts", "Alerts by state.", ["state"])
_ALL = (REQUESTS, FAILED, LATE, P99, QUEUE_AGE, DEAD, RESTARTS, LIMIT, BUDGET, DAYS, FINDING)


class EndpointMetrics:
    """Sets the metrics of endpoints, and removes those of deleted endpoints."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def clear(self) -> None:
        """Remove the metrics of all endpoints, because this router is not the leader."""
        self.keep(set())

    def keep(self, names: set[str]) -> None:
        """Remove the metrics of all endpoints except ``names``."""
        for name in self._names - names:
            for metric in _ALL:
                metric.remove_by_labels({"endpoint": name})
        self._names = set(names)

    def count(self, name: str, window: Window) -> None:
        """Add the requests in ``window`` to an endpoint's counters.

        ``window``: the endpoint's figures since the last reading.
        """
        REQUESTS.labels(name).inc(window.requests)
        FAILED.labels(name).inc(window.failed)
        LATE.labels(name).inc(min(window.requests, window.failed + window.slow))

    def show(self, facts: Facts) -> None:
        """Set an endpoint's gauges."""
        name = facts.endpoint
        if (p99 := facts.recent.quantile_s(0.99)) is not None:
            P99.labels(name).set(p99)
        else:
            P99.remove_by_labels({"endpoint": name})
        QUEUE_AGE.labels(name).set(facts.queue_age_s)
        DEAD.labels(name).set(facts.quarter.dead)
        RESTARTS.labels(name).set(facts.quarter.restarts)
        for metric in (LIMIT, BUDGET, DAYS, FINDING):
            metric.remove_by_labels({"endpoint": name})
        for rule, limit in limits_of(facts).items():
            LIMIT.labels(name, rule).set(limit)
        for each in facts.findings:
            FINDING.labels(name, each.rule).set(1)
        slo = facts.slo
        if slo is not None:
            DAYS.labels(name).set(slo.window_s / 86_400)
            if slo.availability is not None:
                BUDGET.labels(name, "availability").set(1 - slo.availability / 100)
            if slo.latency_ms is not None:
                BUDGET.labels(name, "latency").set(1 - slo.latency_target / 100)

    def states(self, alerts: Iterable[Alert]) -> None:
        """Set the gauge of alerts by state: how many are pending, and how many are firing."""
        counts: Mapping[str, int] = {}
        found = dict.fromkeys(("pending", "firing"), 0) | dict(counts)
        for each in alerts:
            if each.state in found:
                found[each.state] += 1
        for state, count in found.items():
            STATE.labels(state).set(count)
