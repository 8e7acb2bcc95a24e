"""The gateway's Prometheus metrics."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import TypeVar

import numpy as np
from prometheus_client import Counter, Gauge, Histogram

from services.gateway.application.access_log import LoggedAnswer
from services.gateway.application.inference.core import Timing
from services.gateway.domain.llm.refusal import EngineRefused
from services.gateway.domain.routing import RouteTable
from services.gateway.domain.traffic_counts import TrafficCounter
from services.gateway.domain.variant_counts import VariantCounter
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.presence import GatewayLoad
from tidegate.kernel.service.error_answers import status_of

A = TypeVar("A", bound=LoggedAnswer)

_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_PARTS = ("decode", "transit", "wait", "compute", "encode")

ANSWERED = Counter("tidegate_gateway_requests_total", "Requests by outcome.", ["model", "outcome"])
TOTAL = Histogram(
    "tidegate_gateway_request_seconds",
    "Time from a complete request to its answer.",
    ["deployment"],
    buckets=_BUCKETS,
)
PART = Histogram(
    "tidegate_gateway_part_seconds",
    "Time of a request by part: decode, transit, wait, compute or encode.",
    ["deployment", "part"],
    buckets=_BUCKETS,
)
OUTSTANDING = Gauge(
    "tidegate_gateway_outstanding",
    "Requests that wait for their answer.",
    ["deployment"],
    multiprocess_mode="livesum",
)


FIRST_CHUNK = Histogram(
    "tidegate_gateway_first_chunk_seconds",
    "Time from a stream's request to its first answer.",
    ["deployment"],
    buckets=_BUCKETS,
)
CHUNKS = Counter("tidegate_gateway_chunks_total", "Answers of streams.", ["deployment"])
COPIES = Counter(
    "tidegate_gateway_shadow_copies_total",
    "Copies for shadow traffic by outcome: answered, failed, or the reason why no copy was sent.",
    ["model", "outcome"],
)

# The outcome of a request whose caller closed the connection before the answer.
CALLER_GONE = "caller_gone"
# All names that are not in the route table get this one label. So callers cannot create labels.
UNKNOWN = "unknown"
SERVER_ERROR = 500
_FLUSH_AT = 4096
Row = tuple[float, float, float, float, float, float]


class _Times:
    """The times of one Deployment's requests, collected and then added to the histograms in groups.

    Each request adds one value to each of six histograms. To add one value, prometheus_client takes a lock
    and searches a list in Python. When each value was added separately, this took an eighth of the gateway's
    CPU time.
    """

    def __init__(self, model: str, deployment: str) -> None:
        self._count = ANSWERED.labels(model, "ok")
        self._histograms = [TOTAL.labels(deployment), *(PART.labels(deployment, part) for part in _PARTS)]
        self._rows: list[Row] = []
        self.collected: Callable[[np.ndarray], None] | None = None

    def add(self, row: Row) -> None:
        """Add a request's times in seconds: the total, then the parts in the order of ``_PARTS``."""
        self._rows.append(row)
        if len(self._rows) >= _FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Add the collected times to the histograms."""
        if not self._rows:
            return
        rows, self._rows = np.array(self._rows), []
        self._count.inc(len(rows))
        for histogram, values in zip(self._histograms, rows.T, strict=True):
            observe_all(histogram, values)
        if self.collected is not None:
            self.collected(rows)


def http_status(error: TidegateError) -> int:
    """Return the HTTP status of an error. If an engine refused the request, this is the engine's status."""
    return error.status if isinstance(error, EngineRefused) else status_of(error)


def observe_all(histogram: Histogram, values: np.ndarray) -> None:
    """Add all values to a histogram, as ``histogram.observe`` does with one value."""
    at = np.searchsorted(histogram._upper_bounds, values)
    for bucket, count in zip(histogram._buckets, np.bincount(at), strict=False):
        if count:
            bucket.inc(int(count))
    histogram._sum.inc(float(values.sum()))


class GatewayMetrics:
    """Counters of requests, and histograms of the times of requests.

    :meth:`report` adds the collected times to the histograms.

    Only names in the route table become labels, so callers cannot make the metrics page grow. When a name
    leaves the table, its label is removed, but only if the gateway has a single process.
    """

    def __init__(self, table: Callable[[], RouteTable | None] = lambda: None) -> None:
        self._table = table
        self._seen: RouteTable | None = None
        self._times: dict[tuple[str, str], _Times] = {}
        # Other modules add functions here. Each is called with the name of an endpoint that left the table.
        self.on_forget: list[Callable[[str], None]] = []
        self.variants = VariantCounter()
        self.traffic = TrafficCounter()

    def answered(self, model: str, deployment: str, timing: Timing, total: float) -> None:
        """Count a request that was answered in ``total`` seconds."""
        times = self._times.get((model, deployment))
        if times is None:
            times = self._times[(model, deployment)] = _Times(model, deployment)
            times.collected = partial(self._collected, model, deployment)
        t = timing
        times.add((total, t.decode, t.transit(total), t.wait, t.compute, t.encode))

    def copied(self, model: str, outcome: str) -> None:
        """Count the outcome of a copy for shadow traffic."""
        COPIES.labels(model, outcome).inc()

    def report(self, loads: dict[str, GatewayLoad]) -> None:
        """Update the metrics from the collected times and the given loads. Call this a few times a second."""
        for times in self._times.values():
            times.flush()
        table = self._table()
        if table is not self._seen:
            self._forget(self._seen, table)
            self._seen = table
            if table is not None:
                self.variants.keep({name for name, each in table.endpoints.items() if each.compared})
                self.traffic.keep(table.endpoints.keys(), set(table.deployments()))
        for name, load in loads.items():
            OUTSTANDING.labels(name).set(load.outstanding)

    def _forget(self, before: RouteTable | None, table: RouteTable | None) -> None:
        """Remove the labels of names that left the table.

        If there are several processes, do nothing: prometheus_client cannot remove labels then.
        """
        if before is None or table is None or "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            return
        endpoints = before.endpoints.keys() - table.endpoints.keys()
        deployments = set(before.deployments()) - set(table.deployments())
        for model, deployment in list(self._times):
            if model in endpoints or deployment in deployments:
                del self._times[model, deployment]
        for model in endpoints:
            ANSWERED.remove_by_labels({"model": model})
            COPIES.remove_by_labels({"model": model})
            for forget in self.on_forget:
                forget(model)
        for deployment in deployments:
            for metric in (TOTAL, PART, OUTSTANDING, FIRST_CHUNK, CHUNKS):
                metric.remove_by_labels({"deployment": deployment})

    def _label(self, model: str) -> str:
        """Return the label for a model name that a caller sent.

        An unknown name gets the label ``UNKNOWN``. ``POST /v1/jobs`` has no model name in its path. Then
        ``model`` is empty, and the label is empty too.
        """
        table = self._table()
        return model if not model or (table is not None and model in table.endpoints) else UNKNOWN

    async def watch(self, model: str, started: float, answers: AsyncGenerator[A]) -> AsyncGenerator[A]:
        """Yield a stream's answers unchanged, and count them.

        ``started``: the time of ``time.perf_counter`` at which the request began.
        """
        chunks = None
        try:
            async with aclosing(answers):
                async for answer in answers:
                    if chunks is None:
                        name, took = answer.route.name, time.perf_counter() - started
                        FIRST_CHUNK.labels(name).observe(took)
                        t = answer.timing
                        parts = (t.decode, t.transit(took), t.wait, t.compute, t.encode)
                        self.traffic.add_first(model, name, (took, *parts))
                        if self._is_compared(model):
                            self.variants.add_time(model, name, took)
                        chunks = CHUNKS.labels(name)
                    chunks.inc()
                    yield answer
        except TidegateError as error:
            self.failed(model, error)
            raise
        except (GeneratorExit, asyncio.CancelledError):
            self.refused(model, CALLER_GONE)
            raise
        ANSWERED.labels(self._label(model), "ok").inc()
        self.traffic.add_outcome(model, "ok")

    def _is_compared(self, model: str) -> bool:
        endpoint = self._seen.endpoints.get(model) if self._seen is not None else None
        return endpoint is not None and endpoint.compared

    def _collected(self, model: str, deployment: str, rows: np.ndarray) -> None:
        self.traffic.add(model, deployment, rows)
        if self._is_compared(model):
            self.variants.add_times(model, deployment, rows[:, 0])

    def failed(self, model: str, error: TidegateError) -> None:
        """Count a request that ended with an error."""
        served = http_status(error) < SERVER_ERROR
        self.refused(model, error.reason, failed=not served)
        if error.deployment and not served and self._is_compared(model):
            if error.cut_after_s:
                # The caller's timeout was shorter than the endpoint's, so this is no failure of the
                # Deployment. Without the timeout, the answer would have taken at least ``cut_after_s``.
                self.variants.add_time(model, error.deployment, error.cut_after_s)
            else:
                self.variants.add_failure(model, error.deployment)

    def refused(self, model: str, reason: str, *, failed: bool = False) -> None:
        """Count a request that the model did not answer.

        ``reason``: the value of the label ``outcome`` in the metrics. ``failed``: True if the service caused
        the failure.
        """
        label = self._label(model)
        ANSWERED.labels(label, reason).inc()
        if label and label != UNKNOWN:
            self.traffic.add_outcome(label, reason, failed=failed)
