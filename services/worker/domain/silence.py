"""Measure for how long a model with open calls has not answered, and decide when that is too long."""

from __future__ import annotations

from collections.abc import Sequence

# A check adds at most this many seconds to the silence. If more time has passed since the last check, the
# worker itself was paused, and the model did not cause the silence.
LONGEST_CHECK_S = 1.0
# The longest silence in seconds if ``progress_timeout_s`` is not set. If a caller has a longer timeout, that
# timeout is the limit.
SILENCE_S = 60.0


class Silence:
    """The time since the last answer of a model. Time without an open call is not counted.

    ``lasts_s``: this time in seconds. ``timeout_s``: the longest timeout of any caller that has waited at
    some time since the last answer, even if it no longer waits. An answer resets both to 0.
    """

    __slots__ = ("_answers", "_checked", "lasts_s", "timeout_s")

    def __init__(self, now: float) -> None:
        self._answers = 0
        self._checked = now
        self.lasts_s = self.timeout_s = 0.0

    def check(self, now: float, answers: int, timeouts_s: Sequence[float]) -> None:
        """Add the time since the last check, if a call is open and no answer came in this time.

        ``answers``: the number of answers so far. ``timeouts_s``: for each open call, the timeout of its
        caller.
        """
        passed_s, self._checked = now - self._checked, now
        if answers != self._answers:
            self._answers, self.lasts_s, self.timeout_s = answers, 0.0, 0.0
        elif timeouts_s:
            self.lasts_s += min(passed_s, LONGEST_CHECK_S)
            self.timeout_s = max(self.timeout_s, *timeouts_s)


def silence_limit(progress_timeout_s: float | None, timeout_s: float) -> float:
    """Return the seconds without an answer after which the model's process is ended."""
    return progress_timeout_s or max(SILENCE_S, timeout_s)
