"""Measure the cost of the access log for a request: ``python -m benchmarks.access_log``."""

from __future__ import annotations

import timeit
from types import SimpleNamespace
from typing import Any

from services.gateway.application.access_log import AccessLog
from services.gateway.application.inference.core import Timing
from tidegate.kernel.protocol.access import Principal

CALLS = 200_000
WHO = Principal("key-1", "team", frozenset())
ANSWER: Any = SimpleNamespace(
    timing=Timing(1e-4, 2e-4, 3e-4, 1e-5),
    route=SimpleNamespace(name="digits-v1", version="1"),
    request=SimpleNamespace(id="mine"),
)


def note(log: AccessLog) -> None:
    """Log one successful request. A thread encodes and writes the line, which is not measured."""
    log.answered("rest", "digits", ANSWER, WHO, "0" * 16, status=200, received=900, sent=120, total=0.002)
    log._lines.clear()


def main() -> None:
    """Print the cost for a request without a log line, and for one with a line."""
    log = AccessLog(lambda lines: None, first=0, fraction=0, errors_per_s=1)
    for name, work in (
        ("nothing", lambda: None),
        ("a request without a line", log.take),
        ("a request with a line", lambda: note(log)),
    ):
        best = min(timeit.repeat(work, number=CALLS, repeat=5)) / CALLS
        print(f"{name:<28} {best * 1e9:6.0f} ns")


if __name__ == "__main__":
    main()
