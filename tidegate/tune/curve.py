"""Select the Pareto front and the best point from measured points. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tidegate.kernel.protocol.capacity import Capacity
from tidegate.tune.grid import BatchSetting

# The throughput of two runs with the same setting can differ by this fraction. Points within this fraction of
# the best throughput are treated as equal, and the lowest p99 among them wins.
NOISE = 0.03


@dataclass(frozen=True, slots=True)
class Point:
    """The result of one batching setting with one number of ``connections``.

    ``rps``: successful responses per second. ``batch_mean``: mean number of requests in a call. ``failed``:
    number of error responses and failed connections. A figure is None if it was not measured.
    """

    setting: BatchSetting
    connections: int
    rps: float
    p50_ms: float | None
    p99_ms: float | None
    batch_mean: float | None = None
    answers: int = 0
    failed: int = 0

    def fits(self, latency_ms: float) -> bool:
        """Return True if no request failed and the p99 is at most ``latency_ms``."""
        return not self.failed and self.p99_ms is not None and self.p99_ms <= latency_ms

    def to_json(self) -> dict[str, Any]:
        """Return the point as plain JSON types."""
        fields = asdict(self)
        del fields["setting"]
        return {**self.setting.to_json(), **fields}

    def capacity(self) -> Capacity:
        """Return the measured capacity, which is stored with the version."""
        assert self.p99_ms is not None
        return Capacity(self.rps, self.p99_ms, self.setting.max_batch, self.setting.window_ms)


def quantile(ascending: Sequence[float], share: float) -> float | None:
    """Return the nearest-rank quantile of sorted values; None without values."""
    if not ascending:
        return None
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def front(points: Sequence[Point]) -> list[Point]:
    """Return the Pareto front, by ascending p99.

    The front leaves out a point if another point is at least as good in throughput and in p99. It also leaves
    out points with failed requests.
    """
    measured = [point for point in points if point.p99_ms is not None and not point.failed]
    found: list[Point] = []
    for point in sorted(measured, key=lambda each: (each.p99_ms or 0.0, -each.rps)):
        if not found or point.rps > found[-1].rps:
            found.append(point)
    return found


def choose(points: Sequence[Point], latency_ms: float) -> Point | None:
    """Return the point with the highest throughput and a p99 within ``latency_ms``, or None.

    If the throughput of several points differs only by noise, return the one with the lowest p99.
    """
    fitting = [point for point in points if point.fits(latency_ms)]
    if not fitting:
        return None
    best = max(point.rps for point in fitting)
    alike = [point for point in fitting if point.rps >= best * (1 - NOISE)]
    return min(alike, key=lambda each: (each.p99_ms or 0.0, -each.rps))
