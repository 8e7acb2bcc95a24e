"""Let jobs wait while their upstream does not answer, so that they do not fail."""

from __future__ import annotations

import time
from collections.abc import Sequence

from services.worker.application.model_calls import CallFailure
from services.worker.domain.job_backlog import QueuedJob
from services.worker.domain.upstream_wait import pause_s
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError, UpstreamUnavailable

log = telemetry.logger(__name__)


class UpstreamPatience:
    """Decides how long jobs wait for their upstream. Each job waits at most ``wait_s`` seconds in total."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s

    @property
    def wait_s(self) -> float:
        """Return the longest time, in seconds, for which a job waits for its upstream."""
        return self._wait_s

    def pause_s(self, group: Sequence[QueuedJob], failure: CallFailure[QueuedJob]) -> float | None:
        """Return the seconds to wait before the call is retried; None if its jobs must fail now."""
        if not self._wait_s or not isinstance(failure.error, UpstreamUnavailable):
            return None
        return self._next(group, failure.error)

    def _next(self, group: Sequence[QueuedJob], error: TidegateError) -> float | None:
        now = time.monotonic()
        fresh = [job for job in group if job.upstream_since is None]
        for job in fresh:
            job.upstream_since = now
        waited = now - min(job.upstream_since or now for job in group)
        pause = pause_s(waited)
        expires = min(job.request.deadline_ms for job in group) / 1e3 - time.time()
        if waited + pause > self._wait_s or pause > expires:
            return None
        if fresh:
            log.warning(
                "jobs wait for their upstream",
                extra={"jobs": len(fresh), "problem": error.message, "at_most_s": self._wait_s},
            )
        return pause
