"""Export spans with OpenTelemetry's protocol (OTLP over HTTP), configured by the variables ``OTEL_*``.

Services do not use the tracer of the OpenTelemetry SDK, because it takes 85 microseconds for two spans, even
if it drops them. Instead, a service decides at the start of a request if the request is traced. At the end of
a traced request, it builds the spans from times that it measures anyway.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from tidegate.kernel import telemetry
from tidegate.kernel.protocol.trace_context import TraceContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext

log = telemetry.logger(__name__)

Kind = Literal["server", "producer", "consumer", "client"]
Attributes = Mapping[str, str | int | float | bool]
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# How many seconds a process waits at its end for the export of its last spans. Without this limit, a receiver
# that never answers would keep the process from ending.
CLOSE_S = 2.0
# How many times the wall clock and the monotonic clock are read to compute their offset. One reading is not
# enough: if the process is preempted during a reading, the offset is wrong.
READINGS = 5


class Span(NamedTuple):
    """A span. ``start``, ``end``: seconds since the epoch. ``error``: a text; empty if no error occurred."""

    name: str
    kind: Kind
    context: TraceContext
    parent: TraceContext | None
    start: float
    end: float
    attributes: Attributes
    links: Sequence[TraceContext] = ()
    error: str = ""


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if the variables ``OTEL_*`` name a receiver of traces."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    return any(environment.get(name) for name in _ENDPOINTS)


def new_context(trace_id: int = 0) -> TraceContext:
    """Return the context of a new span. Without ``trace_id``, the span begins a new trace."""
    return TraceContext(trace_id or random.getrandbits(128) | 1, random.getrandbits(64) | 1, True)


def epoch_ahead(
    wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
) -> float:
    """Return how many seconds the wall clock is ahead of the monotonic clock.

    Read the wall clock ``READINGS`` times, each time between two readings of the monotonic clock. Return the
    offset for which these two readings were closest to each other. The calling code should use one offset for
    all spans of a request. Otherwise, the order of the spans can be wrong. The offset is also valid for
    ``time.perf_counter``, which is the same clock as ``time.monotonic``.
    """
    readings = []
    for _ in range(READINGS):
        before, now, after = monotonic(), wall(), monotonic()
        readings.append((after - before, now - (before + after) / 2))
    return min(readings)[1]


class SpanExport:
    """An exporter that sends spans in batches. It has a thread of its own for this.

    It drops spans if the receiver is too slow.
    """

    def __init__(self, service: str, **resource: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # Hide the SDK's warning about each failed attempt to export. The SDK's one error for each lost batch
        # is enough.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        own = {"service.namespace": "tidegate", "service.name": service, **resource}
        if "OTEL_SERVICE_NAME" in os.environ:
            del own["service.name"]
        self._resource = Resource.create(own)
        self._processor: BatchSpanProcessor = BatchSpanProcessor(OTLPSpanExporter())

    def add(self, span: Span) -> None:
        """Add a span to the next batch that is exported."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import Link, SpanKind
        from opentelemetry.trace.status import Status, StatusCode

        status = Status(StatusCode.ERROR, span.error) if span.error else Status()
        self._processor.on_end(
            ReadableSpan(
                span.name,
                _sdk_context(span.context),
                None if span.parent is None else _sdk_context(span.parent, remote=True),
                self._resource,
                span.attributes,
                links=[Link(_sdk_context(each, remote=True)) for each in span.links],
                kind=SpanKind[span.kind.upper()],
                status=status,
                start_time=int(span.start * 1e9),
                end_time=int(span.end * 1e9),
                instrumentation_scope=_scope(),
            )
        )

    def close(self) -> None:
        """Send the last spans. Block for at most ``CLOSE_S`` seconds."""
        closing = threading.Thread(target=self._shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    def _shutdown(self) -> None:
        with contextlib.suppress(Exception):
            self._processor.shutdown()  # type: ignore[no-untyped-call]


def _sdk_context(context: TraceContext, *, remote: bool = False) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(context.trace_id, context.span_id, remote, TraceFlags(TraceFlags.SAMPLED))


def _scope() -> InstrumentationScope:
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    from tidegate.version import VERSION

    return InstrumentationScope("tidegate", VERSION)


def export_of(service: str, **resource: str) -> SpanExport | None:
    """Return the exporter that the variables ``OTEL_*`` configure, or None. Never raise an error.

    None means that the variables name no receiver, or that a variable is wrong.
    """
    if not wanted():
        return None
    try:
        return SpanExport(service, **resource)
    except Exception as problem:  # a wrong variable must not keep a service from starting
        log.error("traces cannot be exported: check the variables OTEL_*", extra={"problem": str(problem)})
        return None
