"""Name how a model's process ended, and decide how long its next start waits."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace

MODEL, SERVER = "the model's process", "the model server"
# A process that lived for so long was well: its end is the first one again.
QUIET_S = 60.0
# Starts are at least so far apart after a second death in a row: then twice as far with each, up to the cap.
FIRST_PAUSE_S = 0.5
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
class Row:
    """Deaths in a row, each within ``QUIET_S`` of its start. ``pause_s`` is what the next start waits."""

    deaths: int = 0
    pause_s: float = 0.0


def after_death(row: Row, lived_s: float, *, excused: bool = False) -> Row:
    """Return the row with one more death, of a process that had served for ``lived_s`` seconds.

    The first death never waits. After others, starts are at least 0.5 s apart, then 1, 2, 4 and 5 s. A
    process that lived for longer than that is started again at once. ``excused``: a request that had killed
    before ran alone, so it is to blame and not the model: others do not wait for that.
    """
    if lived_s >= QUIET_S:
        return Row(1)
    if excused:
        return Row(max(1, row.deaths))
    deaths = row.deaths + 1
    if deaths == 1:
        return Row(1)
    apart_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(deaths - 2, 16))
    return replace(row, deaths=deaths, pause_s=max(0.0, apart_s - lived_s))


class Silence:
    """How long a model has owed an answer. Times are seconds of one monotonic clock.

    Time counts while calls are open; each answer of the model ends the silence.
    """

    __slots__ = ("_counted", "_given_up", "_next", "_open", "_since")

    def __init__(self) -> None:
        self._open: dict[int, float] = {}
        self._next = 0
        self._counted = self._since = self._given_up = 0.0

    @property
    def patience_s(self) -> float:
        """Return the longest time that the callers of this silence wait, also of calls that were given up."""
        return max(self._given_up, *self._open.values(), 0.0)

    def begin(self, now: float, patience_s: float) -> int:
        """Count a call whose callers wait for ``patience_s``; return its number."""
        if not self._open:
            self._since = now
        self._next += 1
        self._open[self._next] = patience_s
        return self._next

    def end(self, number: int, now: float, *, answered: bool) -> None:
        """Count the end of a call."""
        patience_s = self._open.pop(number)
        if answered:
            self.answered(now)
            return
        self._given_up = max(self._given_up, patience_s)
        if not self._open:
            self._counted += now - self._since

    def answered(self, now: float) -> None:
        """End the silence, and begin the next one if calls are open."""
        self._counted = self._given_up = 0.0
        self._since = now

    def lasts(self, now: float) -> float:
        """Return for how long calls were open without an answer to any."""
        return self._counted + (now - self._since if self._open else 0.0)


# Without a limit of the Deployment's own. A model whose callers wait for longer gets that time.
SILENCE_S = 60.0


def silence_limit(progress_timeout_s: float | None, patience_s: float) -> float:
    """Return how long a model may owe an answer before its process is ended, in seconds."""
    return progress_timeout_s or max(SILENCE_S, patience_s)
