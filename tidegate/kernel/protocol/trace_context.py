"""The trace context of a request (W3C Trace Context), and how request frames carry it. Pure.

The field ``trace`` of a request frame has the caller's request id. If the request is traced, a separator and
a ``traceparent`` follow in the same field.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tidegate.kernel.protocol.request_ids import LONGEST_ID

# No request id contains this character, because HTTP headers must not contain it.
SEPARATOR = b"\x1f"
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class TraceContext(NamedTuple):
    """A trace and one of its spans. The ids are numbers of 128 and 64 bits, never 0."""

    trace_id: int
    span_id: int
    sampled: bool

    def header(self) -> bytes:
        """Return the context as a ``traceparent``."""
        return b"00-%032x-%016x-%02x" % (self.trace_id, self.span_id, self.sampled)


def parse(header: bytes | None) -> TraceContext | None:
    """Return the context of a ``traceparent``; None if it is missing or malformed."""
    match = _TRACEPARENT.fullmatch(header) if header else None
    if match is None or match[1] == b"ff":
        return None
    found = TraceContext(int(match[2], 16), int(match[3], 16), bool(int(match[4], 16) & 1))
    return found if found.trace_id and found.span_id else None


def attached(request_id: bytes, context: TraceContext) -> bytes:
    """Return the field ``trace`` of a traced request."""
    return request_id[:LONGEST_ID] + SEPARATOR + context.header()


def detached(trace: bytes) -> tuple[bytes, TraceContext | None]:
    """Return the request id and the context of a field ``trace``."""
    request_id, separator, header = trace.partition(SEPARATOR)
    return request_id, parse(header) if separator else None
