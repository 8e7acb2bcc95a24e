"""How long each step of a cold start took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """Collects durations in milliseconds by name; the clock is given (any monotonic seconds)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.ms: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Record how long the block took as ``phase``, also when it fails."""
        begin = self._clock()
        try:
            yield
        finally:
            self.ms[phase] = round((self._clock() - begin) * 1000, 1)

    def record(self, phase: str, seconds: float) -> None:
        """Record a duration measured elsewhere (the launch, by two processes' wall clocks); never below 0."""
        self.ms[phase] = round(max(0.0, seconds) * 1000, 1)
