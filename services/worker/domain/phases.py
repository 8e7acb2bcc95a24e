"""Measure how long each step of a cold start takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """The duration of each phase in milliseconds. ``clock`` returns seconds of any monotonic clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._done: dict[str, float] = {}
        self._started: dict[str, float] = {}

    @property
    def ms(self) -> dict[str, float]:
        """Return the duration of each phase in milliseconds; of a running phase, the time until now."""
        return self._done | {phase: self._since(began) for phase, began in self._started.items()}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Record the duration of the block as ``phase``, even if the block fails."""
        began = self._started[phase] = self._clock()
        try:
            yield
        finally:
            del self._started[phase]
            self._done[phase] = self._since(began)

    def record(self, phase: str, seconds: float) -> None:
        """Record a duration that was measured elsewhere, or 0 if it is negative because two clocks differ."""
        self._done[phase] = round(max(0.0, seconds) * 1000, 1)

    def _since(self, began: float) -> float:
        return round((self._clock() - began) * 1000, 1)
