"""Name how a model's process ended, and decide how long its next start waits."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

MODEL, SERVER = "the model's process", "the model server"
# A process that lived for so long was well: its end is the first one again.
QUIET_S = 60.0
# A process that dies sooner than this after its start makes the next start wait, then twice as long.
SHORTEST_LIFE_S = 0.5
# What lies between two looks counts for no more: it may be that the worker did not run.
LONGEST_LOOK_S = 1.0
LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Death:
    """The end of one process. ``what`` is its role, ``at`` seconds since the epoch.

    ``status`` is its exit code, or the signal's number as a negative one; None: not known. ``starved``: the
    kernel has counted a kill for want of memory meanwhile. ``ended_for`` is why the worker itself ended it.
    """

    what: str
    at: float
    status: int | None = None
    starved: bool = False
    ended_for: str = ""

    @property
    def words(self) -> str:
        """Return the death as a clause: "the model's process ended (signal 9, out of memory?)"."""
        if self.ended_for:
            return f"{self.what} was ended: {self.ended_for}"
        return f"{self.what} ended ({self._status_in_words()})"

    def _status_in_words(self) -> str:
        if self.starved:
            return f"{status_in_words(self.status)}, out of memory"
        # Nobody here has sent it, so most likely the kernel has.
        guess = ", out of memory?" if self.status == -signal.SIGKILL else ""
        return f"{status_in_words(self.status)}{guess}"


def status_in_words(status: int | None) -> str:
    """Return an exit status in words; a negative one is a signal's number."""
    if status is None:
        return "its exit status is not known"
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def of_wait_status(raw: int) -> int:
    """Return the status of a process from what wait(2) says: an exit code, or a negative signal."""
    number = raw & 0x7F
    return -number if number else raw >> 8 & 0xFF


@dataclass(frozen=True, slots=True)
class DeathStreak:
    """Deaths in a row, each within ``QUIET_S`` of its start. ``pause_s`` is what the next start waits.

    ``quick`` are those of late that came before the process had lived for as long as :func:`apart`.
    """

    deaths: int = 0
    pause_s: float = 0.0
    quick: int = 0


def apart(quick: int) -> float:
    """Return how far apart starts are after so many quick deaths, in seconds: 0.5, 1, 2, 4, then 5."""
    return min(LONGEST_PAUSE_S, SHORTEST_LIFE_S * 2.0 ** min(quick, 16))


def after_death(row: DeathStreak, lived_s: float, *, excused: bool = False) -> DeathStreak:
    """Return the row with one more death, of a process that had served for ``lived_s`` seconds.

    Only quick deaths make starts wait, and never the first one. A process that did its work for a while is
    started again at once.
    ``excused``: a request that had killed before ran alone, so it is to blame and not the model.
    """
    if lived_s >= QUIET_S:
        return DeathStreak(1)
    if excused:
        return replace(row, deaths=max(1, row.deaths), pause_s=0.0)
    if lived_s >= apart(row.quick):
        return DeathStreak(row.deaths + 1, 0.0, max(0, row.quick - 1))
    return DeathStreak(row.deaths + 1, apart(row.quick) - lived_s if row.deaths else 0.0, row.quick + 1)


class Silence:
    """The time for which a model has owed an answer, in seconds, measured by regular looks.

    Time counts while calls are open; each answer of the model ends the silence. ``patience_s`` is the longest
    time that the callers of this silence wait, also of calls that were given up.
    """

    __slots__ = ("_answers", "_looked", "lasts_s", "patience_s")

    def __init__(self, now: float) -> None:
        self._answers = 0
        self._looked = now
        self.lasts_s = self.patience_s = 0.0

    def look(self, now: float, answers: int, waiting: Sequence[float]) -> None:
        """Take in how many answers there were so far, and how long the callers of each open call wait."""
        spent_s, self._looked = now - self._looked, now
        if answers != self._answers:
            self._answers, self.lasts_s, self.patience_s = answers, 0.0, 0.0
        elif waiting:
            self.lasts_s += min(spent_s, LONGEST_LOOK_S)
            self.patience_s = max(self.patience_s, *waiting)


# Without a limit of the Deployment's own. A model whose callers wait for longer gets that time.
SILENCE_S = 60.0


def silence_limit(progress_timeout_s: float | None, patience_s: float) -> float:
    """Return how long a model may owe an answer before its process is ended, in seconds."""
    return progress_timeout_s or max(SILENCE_S, patience_s)
