"""The Prometheus metrics of rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge

SHARE = Gauge("tidegate_router_canary_share", "Percent of the traffic that a canary gets.", ["endpoint"])
HARM = Gauge(
    "tidegate_router_canary_harm",
    "Evidence of a canary's harm, divided by its limit. At 1, the canary is rolled back.",
    ["endpoint", "metric"],
)
VERDICTS = Counter("tidegate_router_canary_verdicts_total", "Verdicts about canaries.", ["verdict"])


class RolloutMetrics:
    """The gauges of running rollouts. Those of ended rollouts are removed."""

    def __init__(self) -> None:
        self._known: dict[str, set[str]] = {}

    def show(self, endpoint: str, share: int, evidence: Mapping[str, Mapping[str, Any]]) -> None:
        """Set the gauges of an endpoint's rollout.

        ``evidence``: for each metric, the statistics that compare the canary with the baseline, as in the
        router's API.
        """
        SHARE.labels(endpoint).set(share)
        for metric, each in evidence.items():
            HARM.labels(endpoint, metric).set(each["e_worse"] / each["roll_back_at"])
        self._known.setdefault(endpoint, set()).update(evidence)

    def keep(self, endpoints: set[str]) -> None:
        """Remove the gauges of all endpoints except ``endpoints``."""
        for endpoint in self._known.keys() - endpoints:
            SHARE.remove(endpoint)
            for metric in self._known.pop(endpoint):
                HARM.remove(endpoint, metric)
