"""The export of traces."""

from __future__ import annotations

import time

import pytest

from benchmarks.otlp import receiver
from tidegate.kernel.tracing import (
    CLOSE_S,
    READINGS,
    Span,
    SpanExport,
    epoch_ahead,
    export_of,
    new_context,
    wanted,
)

pytestmark = pytest.mark.unit

URL = "http://collector:4318"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{URL}/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_variables_switch_the_export_on(environment: dict[str, str], expected: bool):
    assert wanted(environment) is expected


def test_without_a_receiver_nothing_is_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert export_of("gateway") is None


@pytest.mark.parametrize("preempted_at", [1, 2])
@pytest.mark.parametrize("undisturbed", range(READINGS))
def test_a_process_that_is_preempted_between_two_clocks_does_not_shift_its_spans(
    preempted_at: int, undisturbed: int
):
    """Preempt the process before the second or the third clock of every round but one."""
    clock = {"now": 100.0, "reading": 0}

    def read(ahead: float) -> float:
        round_, step = divmod(clock["reading"], 3)
        clock["reading"] += 1
        clock["now"] += 0.0026 if step == preempted_at and round_ != undisturbed else 1e-7
        return clock["now"] + ahead

    ahead = epoch_ahead(wall=lambda: read(1_000.0), monotonic=lambda: read(0.0))
    assert ahead == pytest.approx(1_000.0, abs=1e-6)


def span() -> Span:
    now = time.time()
    return Span("rest m", "server", new_context(), None, now - 1, now, {"tidegate.model": "m"})


def test_the_last_spans_are_sent_at_the_end(monkeypatch: pytest.MonkeyPatch):
    with receiver() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        export = SpanExport("gateway")
        sent = span()
        export.add(sent)
        export.close()
        ((service, got),) = found.spans()
    assert (service, got.name) == ("gateway", "rest m")
    assert got.trace_id.hex() == f"{sent.context.trace_id:032x}"
    assert got.end_time_unix_nano - got.start_time_unix_nano == pytest.approx(1e9, rel=1e-3)


def test_a_receiver_that_is_gone_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    export = SpanExport("gateway")
    export.add(span())
    closing = []
    monkeypatch.setattr("threading.Thread.join", lambda _self, timeout=None: closing.append(timeout))
    export.close()
    assert closing[-1] == CLOSE_S
