"""The spans that a gateway exports of a request."""

from __future__ import annotations

import time
from typing import Any

import pytest

from services.gateway.application.access_log import AccessLog
from services.gateway.application.inference.core import Timing
from services.gateway.application.request_traces import BY_CALLERS_PER_S, UNSAMPLED_PER_S, RequestTraces
from services.gateway.domain.trace_sampling import TraceSampler
from tidegate.kernel.errors import TooMany
from tidegate.kernel.protocol.trace_context import detached
from tidegate.kernel.tracing import Span

pytestmark = pytest.mark.unit

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADERS = {b"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01".encode()}


class Spans(list[Span]):
    add = list.append


def traces(ratio: float = 0.0, slow_s: float = 1.0) -> tuple[RequestTraces, Spans]:
    spans = Spans()
    return RequestTraces(spans, TraceSampler(ratio), slow_s), spans


def end(made: RequestTraces, trace: bytes, total: float = 0.1, **more: Any) -> None:
    headers, started = more.pop("headers", {}), more.pop("started", time.perf_counter() - total)
    if made.wants(trace, total, more.get("error")):
        made.ended(trace, headers, "rest m", started, total, {"tidegate.model": "m"}, **more)


def test_a_traced_request_has_a_span_for_the_gateway_and_one_for_the_queue():
    made, spans = traces()
    trace = made.begin(b"mine", HEADERS)
    timing = Timing(decode=0.01, wait=0.02, compute=0.03, encode=0.01)
    end(made, trace, headers=HEADERS, deployment="m-v1", timing=timing)
    server, send = spans
    assert (server.name, server.kind, send.name, send.kind) == ("rest m", "server", "send m-v1", "producer")
    assert server.parent is not None
    assert server.parent.header() == HEADERS[b"traceparent"]
    assert {server.context.trace_id, send.context.trace_id} == {int(TRACE, 16)}
    assert (send.parent, send.context) == (server.context, detached(trace)[1])
    assert server.end - server.start == pytest.approx(0.1)
    assert send.start - server.start == pytest.approx(0.01, abs=1e-6)
    parts = [
        server.attributes[f"tidegate.{n}_ms"] for n in ("decode", "transit", "wait", "compute", "encode")
    ]
    assert parts == pytest.approx([10, 30, 20, 30, 10])


def test_the_times_of_the_spans_do_not_depend_on_when_the_spans_are_built():
    made, spans = traces()
    trace = made.begin(b"mine", HEADERS)
    hour_ago = time.perf_counter() - 3600
    end(made, trace, headers=HEADERS, deployment="m-v1", timing=Timing(decode=0.01), started=hour_ago)
    server, send = spans
    assert time.time() - server.start >= 3599
    assert server.start <= send.start <= send.end == server.end


def test_a_request_that_is_not_traced_keeps_its_id_and_has_no_span():
    made, spans = traces()
    trace = made.begin(b"mine", {})
    assert trace == b"mine"
    end(made, trace, deployment="m-v1")
    assert not spans


def test_slow_and_failed_requests_are_exported_at_a_limited_rate():
    made, spans = traces(slow_s=0.5)
    end(made, b"mine", total=0.6, deployment="m-v1")
    end(made, b"mine", error=TooMany("too many", retry_after_s=1))
    slow, failed = spans
    assert (slow.parent, slow.error, failed.error) == (None, "", "too_many_requests: too many")
    for _ in range(10 * UNSAMPLED_PER_S):
        end(made, b"mine", total=0.6)
    assert len(spans) <= 6 * UNSAMPLED_PER_S


def test_a_slow_request_of_a_trace_that_nobody_samples_keeps_that_trace():
    made, spans = traces(slow_s=0.0)
    headers = {b"traceparent": HEADERS[b"traceparent"][:-1] + b"0"}
    assert made.begin(b"mine", headers) == b"mine"
    end(made, b"mine", headers=headers)
    (span,) = spans
    assert span.context.trace_id == int(TRACE, 16)


def test_callers_that_have_all_their_requests_traced_are_limited():
    made, _ = traces()
    taken = [made.begin(b"mine", HEADERS) for _ in range(10 * BY_CALLERS_PER_S)]
    assert BY_CALLERS_PER_S <= sum(trace != b"mine" for trace in taken) <= 6 * BY_CALLERS_PER_S


def test_attributes_are_built_only_for_requests_that_are_exported():
    made, spans = traces()
    log = AccessLog(None, first=0, fraction=0, errors_per_s=1, traces=made)
    nothing: Any = object()
    log.trace_answer(b"mine", {}, "rest", "m", nothing, status=200, started=time.perf_counter())
    assert not spans
