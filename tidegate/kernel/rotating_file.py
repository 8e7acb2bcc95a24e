"""A log file that several processes write. It is rotated by size: ``x.log``, ``x.log.1``, ...

Parts that are too old are deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tidegate.kernel.log_files import rotated

# The maximum number of files of one log: the current file and its older parts. The limit of the log's total
# size is divided equally among these files.
PARTS = 8
PRUNE_S = 3600.0


class Part(NamedTuple):
    """An older part of a log. ``written_at`` is the time of its last line, in seconds since the epoch."""

    number: int
    written_at: float


def overdue(parts: Sequence[Part], now: float, keep_s: float) -> list[int]:
    """Return the numbers of the parts to delete before a rotation.

    These are the parts that are too old, and those that would exceed ``PARTS`` after the rotation.
    """
    return [part.number for part in parts if part.number >= PARTS - 1 or now - part.written_at > keep_s]


class RotatingFile:
    """A file to which processes append whole lines. Its methods block, so use it in a thread.

    ``total_bytes``: the limit of the size of all parts together. ``keep_s``: how many seconds a part is kept
    after its last line.
    """

    def __init__(
        self, path: Path, total_bytes: int, keep_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._part_bytes = max(1, total_bytes // PARTS)
        self._keep_s = keep_s
        self._clock = clock
        self._file = -1
        self._pruned_at = 0.0

    def append(self, lines: bytes) -> None:
        """Append lines in one write. Raises OSError, for example if the disk is full."""
        self._open()
        os.write(self._file, lines)
        if os.fstat(self._file).st_size > self._part_bytes:
            self._rotate()
        if self._clock() - self._pruned_at > PRUNE_S:
            self._pruned_at = self._clock()
            self.prune()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        """Open the file if it is not open. Open it again if another process has rotated it."""
        if self._file >= 0 and self._is_current():
            return
        self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _is_current(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        return False

    def _rotate(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)  # the lock is released when the file is closed
        if self._is_current():
            parts = rotated(self._path)
            found = [Part(int(part.suffix[1:]), part.stat().st_mtime) for part in parts]
            for number in overdue(found, self._clock(), self._keep_s):
                self._part(number).unlink(missing_ok=True)
            for part in reversed(found):
                with contextlib.suppress(FileNotFoundError):
                    self._part(part.number).rename(self._part(part.number + 1))
            self._path.rename(self._part(1))
        self.close()

    def prune(self) -> None:
        """Delete the older parts whose last line is too old.

        A rotation deletes them too, but a log that grows slowly is seldom rotated.
        """
        for part in rotated(self._path):
            with contextlib.suppress(OSError):
                if self._clock() - part.stat().st_mtime > self._keep_s:
                    part.unlink()

    def _part(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
