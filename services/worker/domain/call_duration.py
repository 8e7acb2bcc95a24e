"""Track how long a model's calls take."""

from __future__ import annotations

from dataclasses import dataclass

SLOW_LIMITS = 5


@dataclass(slots=True)
class Mean:
    """Exponentially weighted mean; None until something was measured."""

    weight: float = 0.05
    value: float | None = None

    def add(self, sample: float) -> None:
        """Take a sample in; the first ones count in full."""
        self.value = sample if self.value is None else self.value + self.weight * (sample - self.value)


class Quickness:
    """Whether a model's calls are over before anybody could cancel one: their mean is below ``limit_s``.

    A call that took many times the limit, or was given up, is taken for what all of them take from now on,
    until enough others have shown that it was not. One that was refused, or failed, shows it by being slow,
    but never by being quick: the model may not have run.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._mean = Mean()

    @property
    def quick(self) -> bool:
        """False, too, before anything was measured."""
        return self._mean.value is not None and self._mean.value < self._limit_s

    def answered(self, spent_s: float) -> None:
        """A call had its answer after so long."""
        if spent_s < SLOW_LIMITS * self._limit_s:
            self._mean.add(spent_s)
        else:
            self.given_up(spent_s)

    def refused(self, spent_s: float) -> None:
        """A call had an error for an answer."""
        if self._mean.value is not None and spent_s > self._mean.value:
            self.answered(spent_s)

    def given_up(self, spent_s: float) -> None:
        """Nobody waited any longer for a call."""
        self._mean.value = max(self._mean.value or 0.0, spent_s, SLOW_LIMITS * self._limit_s)
