"""The gateway's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.gateway.core import Timing
from tidegate.protocol.presence import GatewayLoad

_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_PARTS = ("decode", "transit", "wait", "compute", "encode")

ANSWERED = Counter("tidegate_gateway_requests_total", "Requests by outcome.", ["model", "outcome"])
TOTAL = Histogram(
    "tidegate_gateway_request_seconds",
    "Time from the request's head to its answer.",
    ["deployment"],
    buckets=_BUCKETS,
)
PART = Histogram(
    "tidegate_gateway_part_seconds", "The parts of that time.", ["deployment", "part"], buckets=_BUCKETS
)
OUTSTANDING = Gauge(
    "tidegate_gateway_outstanding",
    "Requests that wait for their answer.",
    ["deployment"],
    multiprocess_mode="livesum",
)


class Metrics:
    """Counts requests; the labelled children are looked up once for each Deployment."""

    def __init__(self) -> None:
        self._children: dict[tuple[str, str], tuple[Counter, Histogram, list[Histogram]]] = {}

    def answered(self, model: str, deployment: str, timing: Timing, total: float) -> None:
        """A request was answered in ``total`` seconds."""
        known = self._children.get((model, deployment))
        if known is None:
            parts = [PART.labels(deployment, part) for part in _PARTS]
            known = ANSWERED.labels(model, "ok"), TOTAL.labels(deployment), parts
            self._children[(model, deployment)] = known
        count, whole, parts = known
        count.inc()
        whole.observe(total)
        values = (timing.decode, timing.transit(total), timing.wait, timing.compute, timing.encode)
        for part, value in zip(parts, values, strict=True):
            part.observe(value)

    def outstanding(self, loads: dict[str, GatewayLoad]) -> None:
        """What waits now, for each Deployment."""
        for name, load in loads.items():
            OUTSTANDING.labels(name).set(load.outstanding)

    def refused(self, model: str, reason: str) -> None:
        """A request was not answered by the model. Unknown model names share one label."""
        ANSWERED.labels("" if reason == "not_found" else model, reason).inc()
