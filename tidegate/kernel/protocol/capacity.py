"""What was measured of a version: how much one replica of it answers, and with which batching.

It is kept with the version, among its metrics, by the names below.
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
    """Requests per second that one replica answered, their p99, and the batching that it had."""

    rps: float
    p99_ms: float
    max_batch: int
    window_ms: float

    def to_metrics(self) -> dict[str, float]:
        """The metrics that a version keeps it in."""
        return {
            RPS: round(self.rps, 3),
            P99_MS: round(self.p99_ms, 3),
            MAX_BATCH: float(self.max_batch),
            WINDOW_MS: self.window_ms,
        }


def measured_rps(metrics: Mapping[str, float]) -> float | None:
    """The measured requests per second of one replica; None where there is no usable figure."""
    rps = metrics.get(RPS)
    return rps if rps is not None and math.isfinite(rps) and rps > 0 else None
