"""The measured capacity of a version: the requests per second of one replica, and its batching.

The capacity is stored among the version's metrics, under the names below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

RPS = "capacity_rps"
P99_MS = "capacity_p99_ms"
MAX_BATCH = "capacity_max_batch"
WINDOW_MS = "capacity_window_ms"


@dataclass(frozen=True, slots=True)
class Capacity:
    """The measured capacity of a replica and its batching.

    ``rps``: the requests per second that it answered. ``p99_ms``: the 99th percentile of their latency.
    """

    rps: float
    p99_ms: float
    max_batch: int
    window_ms: float

    def to_metrics(self) -> dict[str, float]:
        """Return the capacity as metrics of a version."""
        return {
            RPS: round(self.rps, 3),
            P99_MS: round(self.p99_ms, 3),
            MAX_BATCH: float(self.max_batch),
            WINDOW_MS: self.window_ms,
        }


def measured_rps(metrics: Mapping[str, float]) -> float | None:
    """Return the measured requests per second of one replica, or None without a usable value."""
    rps = metrics.get(RPS)
    return rps if rps is not None and math.isfinite(rps) and rps > 0 else None
