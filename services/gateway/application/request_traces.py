"""Traces of requests: the spans of a gateway, built at the end of a request from its measured times.

When a request begins, the sampler decides whether it is traced. The frame of a traced request contains the
trace context of the gateway's span ``send``. The worker reads this context and adds its own spans to the
trace. If a request is slow or fails, but the sampler did not choose it, only the gateway's span is exported.
The span's attributes show where the time was spent.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from typing import Any, Protocol

from services.gateway.application.inference.core import Timing
from services.gateway.domain.trace_sampling import TraceSampler, sampler_of
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol import trace_context
from tidegate.kernel.protocol.trace_context import SEPARATOR
from tidegate.kernel.token_bucket import TokenBucket
from tidegate.kernel.tracing import Attributes, Span, SpanExport, epoch_ahead, export_of, new_context

log = telemetry.logger(__name__)

Headers = Mapping[bytes, bytes]
# The sampler does not choose some of the slow or failed requests. Export at most this many of these requests
# per second. A few traces are enough to show the cause.
UNSAMPLED_PER_S = 20
# A caller can request a trace with the header ``traceparent``. Trace at most this many of these requests per
# second, because a span takes as much time as a small request.
BY_CALLERS_PER_S = 200


class Export(Protocol):
    """Receives the spans."""

    def add(self, span: Span) -> None:
        """Queue a span for export."""


class RequestTraces:
    """The traces of one gateway process.

    ``slow_s``: a request that takes at least this many seconds is slow. Some slow or failed requests are
    exported although the sampler did not choose them.
    """

    def __init__(self, export: Export, sampler: TraceSampler, slow_s: float) -> None:
        self._export = export
        self._sampler = sampler
        self._slow_s = slow_s
        self._unsampled = TokenBucket(UNSAMPLED_PER_S, UNSAMPLED_PER_S * 5)
        self._by_callers = TokenBucket(BY_CALLERS_PER_S, BY_CALLERS_PER_S * 5)

    def begin(self, rid: bytes, headers: Headers) -> bytes:
        """Return the field ``trace`` of a request's frame.

        The field contains ``rid``, the request's id. For a traced request, it also contains a trace context.
        """
        header = headers.get(b"traceparent")
        parent = trace_context.parse(header) if header is not None else None
        if not self._sampler.take(parent, random.random):
            return rid
        if parent is not None and not self._by_callers.take(time.monotonic()):
            return rid
        return trace_context.attached(rid, new_context(parent.trace_id if parent else 0))

    def wants(self, trace: bytes, total: float, error: TidegateError | None = None) -> bool:
        """Return True if a request that took ``total`` seconds must be exported.

        The calling code must call this method once per request. It should build the attributes of spans only
        after this call, because most requests are not exported.
        """
        if SEPARATOR in trace:
            return True
        return (error is not None or total >= self._slow_s) and self._unsampled.take(time.monotonic())

    def ended(
        self,
        trace: bytes,
        headers: Headers | None,
        name: str,
        started: float,
        total: float,
        attributes: Attributes,
        *,
        deployment: str = "",
        timing: Timing | None = None,
        error: TidegateError | None = None,
    ) -> None:
        """Export a request that took ``total`` seconds.

        The calling code may call this method only if :meth:`wants` returned True. ``started``: the value of
        ``time.perf_counter`` when the request began. The spans' times are computed from ``started`` and not
        from the present time, because the process may have paused before this call.
        """
        sent = trace_context.detached(trace)[1]
        parent = trace_context.parse(headers.get(b"traceparent")) if headers else None
        trace_id = sent.trace_id if sent else parent.trace_id if parent else 0
        own, begin = new_context(trace_id), started + epoch_ahead()
        problem = f"{error.reason}: {error.message[:500]}" if error else ""
        parts = timing_attributes(timing, total) if timing else {}
        self._export.add(
            Span(name, "server", own, parent, begin, begin + total, {**attributes, **parts}, error=problem)
        )
        if sent is not None and deployment:
            start, end = begin + (timing.decode if timing else 0.0), begin + total
            about = {
                "messaging.system": "rabbitmq",
                "messaging.operation.type": "send",
                "messaging.destination.name": deployment,
            }
            self._export.add(Span(f"send {deployment}", "producer", sent, own, start, end, about))


def timing_attributes(timing: Timing, total: float) -> dict[str, Any]:
    """Return the parts of a request's time as attributes, in milliseconds."""
    parts = {
        "decode": timing.decode,
        "transit": timing.transit(total),
        "wait": timing.wait,
        "compute": timing.compute,
        "encode": timing.encode,
    }
    return {f"tidegate.{name}_ms": round(seconds * 1e3, 3) for name, seconds in parts.items()}


def request_traces_of(slow_ms: float) -> tuple[RequestTraces, SpanExport] | tuple[None, None]:
    """Return the traces and their exporter, set up from the environment variables ``OTEL_*``.

    Both are None if these variables name no server for traces.
    """
    export = export_of("gateway")
    if export is None:
        return None, None
    try:
        sampler = sampler_of(os.environ)
    except ValueError as problem:
        log.error("a trace setting is invalid; the default sampler is used", extra={"problem": str(problem)})
        sampler = sampler_of({})
    return RequestTraces(export, sampler, slow_ms / 1e3), export
