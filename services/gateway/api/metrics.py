"""The gateway's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

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

    def refused(self, model: str, reason: str) -> None:
        """A request was not answered by the model. Unknown model names share one label."""
        ANSWERED.labels("" if reason == "not_found" else model, reason).inc()


class LoadCollector(Collector):
    """What is outstanding now, read when it is asked for."""

    def __init__(self, loads: Callable[[], dict[str, GatewayLoad]]) -> None:
        self._loads = loads

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Prometheus' callback."""
        gauge = GaugeMetricFamily(
            "tidegate_gateway_outstanding", "Requests that wait for their answer.", labels=["deployment"]
        )
        for name, load in self._loads().items():
            gauge.add_metric([name], load.outstanding)
        yield gauge

    def register(self) -> None:
        """Show up in /metrics."""
        REGISTRY.register(self)
