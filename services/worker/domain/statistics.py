"""What a model did, counted for its users: per request, though requests share model calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from services.worker.domain.call_duration import Mean
from tidegate.kernel.protocol.statistics import (
    BATCH,
    CACHE,
    COMPUTE,
    EXECUTIONS,
    INFERENCES,
    count_name,
    time_name,
)


class RequestCounts:
    """Counts of requests since they were last taken."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()

    def answered(self, requests: int, rows: int, waited_s: float, call_s: float) -> None:
        """``requests`` of ``rows`` shared a call of ``call_s``, after waits of ``waited_s`` in all."""
        counts = self._counts
        counts["success.count"] += requests
        counts["success.ns"] += int((waited_s + call_s * requests) * 1e9)
        counts["queue.count"] += requests
        counts["queue.ns"] += int(waited_s * 1e9)
        counts["compute_infer.ns"] += int(call_s * requests * 1e9)
        counts[INFERENCES] += rows

    def failed(self, requests: int, spent_s: float) -> None:
        """``requests`` failed, each after ``spent_s``."""
        self._counts["fail.count"] += requests
        self._counts["fail.ns"] += int(spent_s * requests * 1e9)

    def take(self, triton: Mapping[str, int]) -> dict[str, int]:
        """All counts, with ``triton``'s own of the same time to divide the calls by; then begin anew."""
        counts, self._counts = self._counts, Counter()
        requests = counts["success.count"]
        for part in COMPUTE:
            counts[count_name(part)] = requests
        if calls := triton.get("success.count", 0):
            del counts["compute_infer.ns"]
            for part in ("queue", *COMPUTE):
                counts[time_name(part)] += triton.get(time_name(part), 0) * requests // calls
        counts[EXECUTIONS] = triton.get(EXECUTIONS, 0)
        counts.update({name: count for name, count in triton.items() if name.startswith((BATCH, *CACHE))})
        counts.update(self._untold)
        self._untold = Counter()
        return {name: count for name, count in counts.items() if count}

    def give_back(self, counts: Mapping[str, int]) -> None:
        """Counts that were taken and reached nobody."""
        self._untold.update(counts)


class WorkStats:
    """Totals since the start, and recent means. Times in seconds, ``call_ms`` in milliseconds."""

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.busy_s = 0.0
        self.call_ms = Mean()
        self.batch = Mean()
        self.rows = Mean()
        self.open_calls = Mean()
        self.tally = RequestCounts()


def since(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """What was added between two readings of counts that only grow; a smaller one began anew."""
    return {
        name: count - before[name] if count >= before.get(name, count + 1) else count
        for name, count in now.items()
    }
