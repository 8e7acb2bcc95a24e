"""Trace contexts in headers and in the frames of requests."""

from __future__ import annotations

import pytest

from tidegate.kernel import telemetry
from tidegate.kernel.protocol.trace_context import TraceContext, attached, detached, parse

pytestmark = pytest.mark.unit

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CONTEXT = TraceContext(int(TRACE, 16), int(SPAN, 16), True)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (f"00-{TRACE}-{SPAN}-01", CONTEXT),
        (f"00-{TRACE}-{SPAN}-00", CONTEXT._replace(sampled=False)),
        (f"01-{TRACE}-{SPAN}-03-of-a-later-version", CONTEXT),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        ("", None),
    ],
)
def test_a_traceparent_is_read(header: str, expected: TraceContext | None):
    assert parse(header.encode()) == expected


def test_a_context_travels_beside_the_request_id():
    assert detached(attached(b"mine", CONTEXT)) == (b"mine", CONTEXT)
    assert detached(b"mine") == (b"mine", None)
    assert detached(b"mine\x1fno context") == (b"mine", None)


def test_a_long_id_never_cuts_the_context_off():
    trace = attached(b"x" * 300, CONTEXT)
    assert len(trace) <= 255
    assert detached(trace) == (b"x" * 128, CONTEXT)


def test_logs_show_only_the_request_id():
    assert telemetry.shown_id(attached(b"mine", CONTEXT)) == "mine"
