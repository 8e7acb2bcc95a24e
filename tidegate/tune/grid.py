"""Which settings to measure, and at which load. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONNECTIONS = (1, 8, 64)
WINDOWS_MS = (0.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True, order=True)
class BatchSetting:
    """A value of the knob: at most ``max_batch`` rows in a call, waiting up to ``window_ms`` for them."""

    window_ms: float
    max_batch: int

    def __str__(self) -> str:
        window = f", window {self.window_ms:g} ms" if self.window_ms else ""
        return f"batch {self.max_batch}{window}"

    def to_json(self) -> dict[str, float]:
        """As the ``batching`` of a Deployment."""
        return {"max_batch": self.max_batch, "window_ms": self.window_ms}


def batches(limit: int, rows: int, connections: Iterable[int]) -> list[int]:
    """Sizes of a call worth trying: doubling from one request's ``rows`` to what the model takes.

    ``limit`` is the model's own; 0: it has no batch axis. More rows than all callers together send fill
    no call, so there it ends, too.
    """
    if limit == 0:
        return [1]
    top = max(rows, min(limit, rows * max(connections)))
    found = [rows]
    while found[-1] < top:
        found.append(min(found[-1] * 2, top))
    return found


def settings(batches: Iterable[int], windows_ms: Iterable[float], rows: int) -> list[BatchSetting]:
    """Every batch without a wait first, then the windows: what a run out of time lacks is the least of it.

    A call that one request fills waits for nobody, so a window there is the same as none.
    """
    found = {
        BatchSetting(window_ms if batch > rows else 0.0, batch)
        for batch in batches
        for window_ms in windows_ms
    }
    return sorted(found)


def load_levels(connections: Sequence[int] | None) -> list[int]:
    """The numbers of connections to measure with, ascending, each once."""
    return sorted(set(connections or CONNECTIONS))
