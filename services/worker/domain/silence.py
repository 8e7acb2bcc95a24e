"""Measure for how long a model has owed an answer, and decide when that is too long."""

from __future__ import annotations

from collections.abc import Sequence

# The time between two checks counts for at most this much: the worker itself may not have run.
LONGEST_CHECK_S = 1.0
# The limit without ``progress_timeout_s``. If callers wait for longer, the model gets that time.
SILENCE_S = 60.0


class Silence:
    """The time for which a model has owed an answer, in seconds, measured by regular checks.

    Time counts while calls are open; each answer of the model ends the silence. ``timeout_s`` is the longest
    timeout of the callers of this silence, also of calls that were given up.
    """

    __slots__ = ("_answers", "_checked", "lasts_s", "timeout_s")

    def __init__(self, now: float) -> None:
        self._answers = 0
        self._checked = now
        self.lasts_s = self.timeout_s = 0.0

    def check(self, now: float, answers: int, timeouts_s: Sequence[float]) -> None:
        """Update with the number of answers so far, and the timeout of the callers of each open call."""
        passed_s, self._checked = now - self._checked, now
        if answers != self._answers:
            self._answers, self.lasts_s, self.timeout_s = answers, 0.0, 0.0
        elif timeouts_s:
            self.lasts_s += min(passed_s, LONGEST_CHECK_S)
            self.timeout_s = max(self.timeout_s, *timeouts_s)


def silence_limit(progress_timeout_s: float | None, timeout_s: float) -> float:
    """Return how long a model may owe an answer before its process is ended, in seconds."""
    return progress_timeout_s or max(SILENCE_S, timeout_s)
