"""The spans that a worker exports of a model call."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from services.worker.adapters.call_traces import Call, spans
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.protocol.trace_context import TraceContext, attached

pytestmark = pytest.mark.unit

CALL = Call("m-v1", "m-v1-1", started=100.0, spent=0.5)


@dataclass
class Item:
    request: Request
    received: float


def item(number: int, received: float = 99.0) -> tuple[Item, TraceContext]:
    sender = TraceContext(number, 7, True)
    frame = envelope.request_frame(bytes(16), 0, 2, b"", [], trace=attached(b"id", sender))
    return Item(envelope.read_request(frame), received), sender


def test_the_requests_of_a_batch_share_the_span_of_their_call():
    traced = [item(number) for number in (1, 2, 3)]
    untraced = Item(envelope.read_request(envelope.request_frame(bytes(16), 0, 2, b"", [])), 99.0)
    *processes, call = spans([*(each for each, _ in traced), untraced], traced, CALL, ahead=1_000.0)
    assert [span.context.trace_id for span in processes] == [1, 2, 3]
    assert [span.parent for span in processes] == [sender for _, sender in traced]
    assert call.parent == processes[0].context
    assert [list(span.links) for span in processes] == [[], [call.context], [call.context]]
    assert list(call.links) == [span.context for span in processes[1:]]
    assert (processes[0].start, processes[0].end) == (1_099.0, 1_100.5)
    assert (call.start, call.end) == (1_100.0, 1_100.5)
    assert (call.attributes["messaging.batch.message_count"], call.attributes["tidegate.rows"]) == (4, 8)


def test_a_call_that_failed_marks_its_spans():
    made = item(1)
    failed = Call("m-v1", "m-v1-1", 100.0, 0.5, "failed")
    assert [span.error for span in spans([made[0]], [made], failed, 0.0)] == ["failed", "failed"]
