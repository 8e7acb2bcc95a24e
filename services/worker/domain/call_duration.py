"""Track how long a model's calls take."""

from __future__ import annotations

from dataclasses import dataclass

SLOW_LIMITS = 5


@dataclass(slots=True)
class Mean:
    """An exponentially weighted mean. ``value`` is None before the first sample."""

    weight: float = 0.05
    value: float | None = None

    def add(self, sample: float) -> None:
        """Add a sample; the first one becomes the mean."""
        self.value = sample if self.value is None else self.value + self.weight * (sample - self.value)


class Quickness:
    """Decides if a model's calls are quick. A quick call usually ends before a cancellation could stop it.

    Calls are quick if their mean time is below ``limit_s``. If a call takes at least ``SLOW_LIMITS`` times
    ``limit_s``, or is given up, the mean is raised above ``limit_s``. Later quick calls lower the mean.

    A call with an error is added only if it took longer than the mean. If an error comes sooner, the model
    may not have run.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._mean = Mean()

    @property
    def quick(self) -> bool:
        """Return True if calls are quick; False before the first measured call."""
        return self._mean.value is not None and self._mean.value < self._limit_s

    def answered(self, spent_s: float) -> None:
        """Add a call that was answered after ``spent_s`` seconds."""
        if spent_s < SLOW_LIMITS * self._limit_s:
            self._mean.add(spent_s)
        else:
            self.given_up(spent_s)

    def refused(self, spent_s: float) -> None:
        """Add a call that was answered with an error, if it took longer than the mean."""
        if self._mean.value is not None and spent_s > self._mean.value:
            self.answered(spent_s)

    def given_up(self, spent_s: float) -> None:
        """Add a call that was cancelled or timed out."""
        self._mean.value = max(self._mean.value or 0.0, spent_s, SLOW_LIMITS * self._limit_s)
