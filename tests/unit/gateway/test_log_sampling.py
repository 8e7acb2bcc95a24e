"""The sampling of requests for the access log, and the bound on lines about errors."""

from __future__ import annotations

import pytest

from services.gateway.domain.log_sampling import LogSampler, trace_id
from tidegate.kernel.token_bucket import TokenBucket

TRACE = b"4bf92f3577b34da6a3ce929d0e0e4736"


def test_the_first_of_each_second_and_a_part_of_the_others_get_a_line() -> None:
    sampler = LogSampler(first=10, fraction=0.01)
    assert [sampler.take() for _ in range(10)] == [True] * 10
    assert sum(sampler.take() for _ in range(10_000)) == 100
    sampler.second()
    assert [sampler.take() for _ in range(10)] == [True] * 10


@pytest.mark.parametrize(("fraction", "lines"), [(0.0, 0), (1.0, 1000), (0.4, 400)])
def test_a_fraction_of_the_others(fraction: float, lines: int) -> None:
    sampler = LogSampler(first=0, fraction=fraction)
    assert sum(sampler.take() for _ in range(1000)) == lines


def test_errors_have_a_pace_and_what_is_dropped_is_counted() -> None:
    allowance = TokenBucket(per_s=10, burst=20)
    assert sum(allowance.take(0.0) for _ in range(100)) == 20
    assert allowance.settled() == 80
    assert allowance.settled() == 0
    assert sum(allowance.take(1.0) for _ in range(100)) == 10


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"00-" + TRACE + b"-00f067aa0ba902b7-01", TRACE.decode()),
        (b"00-" + TRACE + b"-00f067aa0ba902b7-01-more", TRACE.decode()),
        (b"00-" + TRACE.upper() + b"-00f067aa0ba902b7-01", ""),
        (b"nonsense", ""),
        (None, ""),
    ],
)
def test_the_trace_id_of_a_traceparent(header: bytes | None, found: str) -> None:
    assert trace_id(header) == found
