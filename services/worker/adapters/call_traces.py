"""Trace model calls: one span for each traced request, and one span for the call that they share.

The span of the call belongs to the trace of the first traced request. The spans of the other requests have
links to the span of the call, as OpenTelemetry's conventions for batches of messages require.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tidegate.kernel.protocol import trace_context
from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.protocol.trace_context import SEPARATOR, TraceContext
from tidegate.kernel.tracing import Attributes, Span, SpanExport, epoch_ahead, export_of, new_context


class Received(Protocol):
    """A request of this worker. ``received``: when it arrived, in seconds of the worker's monotonic clock."""

    request: Request
    received: float


class CallTraces:
    """Export the spans of this worker's model calls. Nothing is exported before :meth:`start` is called."""

    def __init__(self) -> None:
        self._export: SpanExport | None = None
        self._replica = self._deployment = ""

    @property
    def on(self) -> bool:
        """Return True if the spans of calls are exported."""
        return self._export is not None

    def start(self, deployment: str, replica: str) -> None:
        """Export the spans of calls from now on, if the variables ``OTEL_*`` name a server for spans."""
        self._deployment, self._replica = deployment, replica
        self._export = export_of("worker", **{"service.instance.id": replica})

    def stop(self) -> None:
        """Send the last spans. Blocking for up to two seconds."""
        if self._export is not None:
            self._export.close()

    def called(self, group: Sequence[Received], started: float, spent: float, error: str = "") -> None:
        """Export the spans of a call that began at ``started`` and took ``spent`` seconds.

        ``group``: all requests of the call. If none of them is traced, nothing is exported. ``started``:
        seconds of the worker's monotonic clock.
        """
        traced = list(_traced(group)) if self._export is not None else []
        if self._export is None or not traced:
            return
        call = Call(self._deployment, self._replica, started, spent, error)
        for span in spans(group, traced, call, epoch_ahead()):
            self._export.add(span)


@dataclass(frozen=True, slots=True)
class Call:
    """A model call: where it ran, its start on the worker's monotonic clock, and its duration in seconds."""

    deployment: str
    replica: str
    started: float
    spent: float
    error: str = ""


def _traced(group: Iterable[Received]) -> Iterator[tuple[Received, TraceContext]]:
    for item in group:
        if SEPARATOR in item.request.trace:
            context = trace_context.detached(item.request.trace)[1]
            if context is not None:
                yield item, context


def spans(
    group: Sequence[Received], traced: Sequence[tuple[Received, TraceContext]], call: Call, ahead: float
) -> list[Span]:
    """Return the spans of a call.

    ``group``: all requests of the call. ``traced``: those that are traced (at least one), each with the trace
    context of its sender. ``ahead``: the seconds to add to the worker's monotonic clock to get the wall
    clock.
    """
    own = [new_context(sender.trace_id) for _, sender in traced]
    shared = new_context(own[0].trace_id)
    begin, end = call.started + ahead, call.started + call.spent + ahead
    found = []
    for (item, sender), context in zip(traced, own, strict=True):
        attributes: Attributes = {
            "messaging.system": "rabbitmq",
            "messaging.destination.name": call.deployment,
            "messaging.operation.type": "process",
            "tidegate.replica": call.replica,
            "tidegate.attempt": item.request.attempt,
            "tidegate.rows": item.request.rows,
        }
        found.append(
            Span(
                f"process {call.deployment}", "consumer", context, sender, item.received + ahead, end,
                attributes, [] if context is own[0] else [shared], call.error,
            )
        )  # fmt: skip
    about: Attributes = {
        "messaging.batch.message_count": len(group),
        "tidegate.rows": sum(item.request.rows for item in group),
        "tidegate.replica": call.replica,
    }
    name = f"call {call.deployment}"
    return [*found, Span(name, "client", shared, own[0], begin, end, about, own[1:], call.error)]


TRACES = CallTraces()
