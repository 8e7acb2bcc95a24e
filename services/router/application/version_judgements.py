"""Read the drift and the quality of versions, at most once in 30 s.

Alerts and the live numbers of endpoints use these values.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from services.router.domain.alerts.facts import Finding
from services.router.domain.alerts.version_findings import drift_findings, drift_states, quality_findings
from tidegate.kernel.errors import Unavailable

EVERY_S = 30.0

Snapshot = Callable[[], dict[str, Any]]


class VersionJudgements:
    """The drift and the quality of all versions, as they were last read.

    Drift and quality change slowly, so they are read only every ``EVERY_S`` seconds.
    """

    def __init__(self, drift: Snapshot, quality: Snapshot) -> None:
        self._drift, self._quality = drift, quality
        self._read_at = float("-inf")
        self._drifts: list[dict[str, Any]] = []
        self._qualities: list[dict[str, Any]] = []

    def findings(self) -> list[Finding]:
        """Return the findings about drift and quality."""
        self._read()
        return [*drift_findings(self._drifts), *quality_findings(self._qualities, self._drifts)]

    def drift_states(self) -> dict[str, str]:
        """Return each endpoint's worst drift state."""
        self._read()
        return drift_states(self._drifts)

    def _read(self) -> None:
        if time.monotonic() - self._read_at < EVERY_S:
            return
        self._read_at = time.monotonic()
        with contextlib.suppress(Unavailable):
            self._drifts = self._drift()["items"]
            self._qualities = self._quality()["items"]
