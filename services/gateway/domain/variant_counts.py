"""Count answers, failures and latencies by Deployment, for endpoints that compare Deployments."""

from __future__ import annotations

import numpy as np

from tidegate.kernel.protocol.latency_buckets import COUNT, bucket_of, buckets_of
from tidegate.kernel.protocol.presence import VariantCounts


class VariantCounter:
    """The counts of one process since its start, by endpoint and Deployment."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, str], np.ndarray] = {}
        self._failed: dict[tuple[str, str], int] = {}

    def add_times(self, endpoint: str, deployment: str, seconds: np.ndarray) -> None:
        """Count answers by their times in seconds."""
        self._of(endpoint, deployment)[:] += buckets_of(seconds)

    def add_time(self, endpoint: str, deployment: str, seconds: float) -> None:
        """Count one answer by its time in seconds."""
        self._of(endpoint, deployment)[bucket_of(seconds)] += 1

    def add_failure(self, endpoint: str, deployment: str) -> None:
        """Count a request that failed because of the Deployment."""
        key = (endpoint, deployment)
        self._failed[key] = self._failed.get(key, 0) + 1
        self._of(endpoint, deployment)

    def keep(self, endpoints: set[str]) -> None:
        """Keep only the counts of these endpoints."""
        for counts in (self._times, self._failed):
            for key in [key for key in counts if key[0] not in endpoints]:
                del counts[key]

    def report(self) -> dict[str, dict[str, VariantCounts]]:
        """Return the counts by endpoint and Deployment."""
        found: dict[str, dict[str, VariantCounts]] = {}
        for (endpoint, deployment), times in self._times.items():
            failed = self._failed.get((endpoint, deployment), 0)
            found.setdefault(endpoint, {})[deployment] = VariantCounts(failed, times.tolist())
        return found

    def _of(self, endpoint: str, deployment: str) -> np.ndarray:
        key = (endpoint, deployment)
        times = self._times.get(key)
        if times is None:
            times = self._times[key] = np.zeros(COUNT, np.int64)
        return times
