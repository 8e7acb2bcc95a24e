"""How long each step of a cold start took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """Collects durations in milliseconds by name; the clock is given (any monotonic seconds)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._done: dict[str, float] = {}
        self._under_way: dict[str, float] = {}

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds by phase; those of a phase that is under way run on."""
        return self._done | {phase: self._since(begin) for phase, begin in self._under_way.items()}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Record how long the block took as ``phase``, also when it fails."""
        begin = self._under_way[phase] = self._clock()
        try:
            yield
        finally:
            del self._under_way[phase]
            self._done[phase] = self._since(begin)

    def record(self, phase: str, seconds: float) -> None:
        """Record a duration measured elsewhere (the launch, by two processes' wall clocks); never below 0."""
        self._done[phase] = round(max(0.0, seconds) * 1000, 1)

    def _since(self, begin: float) -> float:
        return round((self._clock() - begin) * 1000, 1)
