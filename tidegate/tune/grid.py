"""Compute the settings and loads to measure. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONNECTIONS = (1, 8, 64)
WINDOWS_MS = (0.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True, order=True)
class BatchSetting:
    """A batching setting to measure.

    ``max_batch``: the most rows in a call. ``window_ms``: the longest time that a call waits for more rows.
    """

    window_ms: float
    max_batch: int

    def __str__(self) -> str:
        window = f", window {self.window_ms:g} ms" if self.window_ms else ""
        return f"batch {self.max_batch}{window}"

    def to_json(self) -> dict[str, float]:
        """Return the setting as the ``batching`` of a Deployment."""
        return {"max_batch": self.max_batch, "window_ms": self.window_ms}


def batches(limit: int, rows: int, connections: Iterable[int]) -> list[int]:
    """Return the batch sizes to try: one request's ``rows``, then twice as many each time.

    The sizes grow up to the smaller of two numbers: the model's ``limit``, and ``rows`` times the highest
    number in ``connections``. If ``limit`` is 0, the model has no batch axis, and the only size is 1.
    """
    if limit == 0:
        return [1]
    top = max(rows, min(limit, rows * max(connections)))
    found = [rows]
    while found[-1] < top:
        found.append(min(found[-1] * 2, top))
    return found


def settings(batches: Iterable[int], windows_ms: Iterable[float], rows: int) -> list[BatchSetting]:
    """Return the settings to measure.

    ``windows_ms``: the waits to try. A wait is the time for which a call waits for more rows. ``rows``: the
    rows of one request. Settings with a wait of 0 come first, in case the time for the measurement runs out.
    If one request fills a batch, a call never waits for more rows. So this batch size is tried only with a
    wait of 0.
    """
    found = {
        BatchSetting(window_ms if batch > rows else 0.0, batch)
        for batch in batches
        for window_ms in windows_ms
    }
    return sorted(found)


def load_levels(connections: Sequence[int] | None) -> list[int]:
    """Return the numbers of connections to try, ascending, without duplicates."""
    return sorted(set(connections or CONNECTIONS))
