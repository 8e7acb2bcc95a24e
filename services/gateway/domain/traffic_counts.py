"""Count the traffic of every endpoint: outcomes, and histograms of times by Deployment."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from tidegate.kernel.protocol.traffic import EndpointTraffic
from tidegate.kernel.protocol.traffic_histograms import histograms_of, no_times, sparse

# The largest number of error reasons that are counted by name for an endpoint. Engines may report any reason.
MOST_REASONS = 40
OTHER = "other"


class TrafficCounter:
    """The counts of one process since its start."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, str], np.ndarray] = {}
        self._outcomes: dict[str, dict[str, int]] = {}
        self._failed: dict[str, int] = {}

    def add(self, endpoint: str, deployment: str, seconds: np.ndarray) -> None:
        """Count answered requests. ``seconds``: for each request, a row with the total time and its parts."""
        self._of(endpoint, deployment)[:] += histograms_of(seconds)
        self._count(endpoint, "ok", len(seconds))

    def add_first(self, endpoint: str, deployment: str, seconds: Sequence[float]) -> None:
        """Count the time to the first answer of a stream, and the parts of this time.

        ``seconds``: the times in the order of ``ROWS``. The outcome is counted when the stream ends.
        """
        self._of(endpoint, deployment)[:] += histograms_of(np.array([seconds]))

    def add_outcome(self, endpoint: str, outcome: str, *, failed: bool = False) -> None:
        """Count the end of a stream, or a request without an answer.

        ``failed``: True if the request failed because of the service (status 500 or more).
        """
        self._count(endpoint, outcome, 1)
        if failed:
            self._failed[endpoint] = self._failed.get(endpoint, 0) + 1

    def keep(self, endpoints: Collection[str], deployments: Collection[str]) -> None:
        """Keep only the counts of these endpoints and Deployments."""
        self._times = {
            key: times for key, times in self._times.items() if key[0] in endpoints and key[1] in deployments
        }
        self._outcomes = {name: each for name, each in self._outcomes.items() if name in endpoints}
        self._failed = {name: each for name, each in self._failed.items() if name in endpoints}

    def report(self) -> dict[str, EndpointTraffic]:
        """Return the counts by endpoint."""
        found = {
            name: EndpointTraffic(dict(outcomes), self._failed.get(name, 0))
            for name, outcomes in self._outcomes.items()
        }
        for (endpoint, deployment), times in self._times.items():
            found.setdefault(endpoint, EndpointTraffic()).times[deployment] = sparse(times)
        return found

    def _count(self, endpoint: str, outcome: str, number: int) -> None:
        outcomes = self._outcomes.setdefault(endpoint, {})
        if outcome not in outcomes and len(outcomes) >= MOST_REASONS:
            outcome = OTHER
        outcomes[outcome] = outcomes.get(outcome, 0) + number

    def _of(self, endpoint: str, deployment: str) -> np.ndarray:
        key = (endpoint, deployment)
        times = self._times.get(key)
        if times is None:
            times = self._times[key] = no_times()
        return times
