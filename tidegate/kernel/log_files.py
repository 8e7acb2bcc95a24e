"""Read the logs in the state folder: ``<service>.log``, ``worker-<replica>.log``, and rotated parts."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tidegate.kernel.errors import NotFound
from tidegate.kernel.protocol import log_lines
from tidegate.kernel.protocol.log_lines import LogEntry

BLOCK = 64 * 1024
# The most bytes that are read from the end of one log.
MOST_BYTES = 16 * 2**20
# A line can reach its log a moment after the time that it states. A reader that follows a log stays this many
# seconds behind, so that it misses no line.
SETTLE_S = 0.3
MOST_OF_REQUEST = 1000
MOST_LINKED = 20
_WORKER = "worker-"


class LogFolder:
    """The logs of one stack."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """Return the services and replicas that have a log."""
        return sorted(log_lines.log_of(path.name) for path in self.path.glob("*.log"))

    def find(self, name: str, targets: Sequence[str] = (), others: Iterable[str] = ()) -> list[str]:
        """Return the logs that a name means (see ``log_lines.meant``).

        Raises NotFound if there are none. The message then shows similar names.
        """
        names = self.names()
        found = log_lines.meant(name, names, targets)
        if found:
            return found
        near = log_lines.near(name, names, others)
        hint = f"Similar names: {', '.join(near)}." if near else "`tidegate status` shows what is deployed."
        raise NotFound(f"There is no log of {name!r}. {hint}")

    def read(self, logs: Iterable[str], *, since: float, until: float, lines: int) -> list[LogEntry]:
        """Return the newest lines of these logs, at most ``lines`` lines, in order of time.

        The times of all returned lines are after ``since``, and at most ``until``.
        """
        found: list[LogEntry] = []
        for log in logs:
            # Files are chosen by their modification time, which may be later than the times of their lines.
            # So the time of each line is checked as well.
            found += [each for each in self._read(log, since, lines) if since < each.at <= until]
        found.sort(key=lambda each: each.at)
        return found[-lines:] if lines else []

    def of_request(self, id_: str) -> list[LogEntry]:
        """Return the lines about a request or job from all logs, in order of time.

        If there are more than ``MOST_OF_REQUEST`` lines, return the newest.
        """
        ids, new, found = {id_}, {id_}, dict[tuple[str, int], LogEntry]()
        files = [*self.path.glob("*.log*")]
        # The log of a worker from a warm pool has two names. Use the replica's name, which users know.
        linked = {path.resolve() for path in files if path.is_symlink()}
        files = [path for path in files if path.is_symlink() or path.resolve() not in linked]
        for _ in range(2):
            for path in files:
                log = log_lines.log_of(path.name)
                for at, text in _lines_with(path, new):
                    entry = log_lines.parse(text, log, 0.0)
                    if not ids.isdisjoint(log_lines.ids_in(entry.fields)):
                        found[path.name, at] = entry
                    if len(found) >= 2 * MOST_OF_REQUEST:  # a caller may use one id for all its requests
                        found = _youngest(found)
            new = set(sorted(log_lines.linked(found.values()) - ids)[:MOST_LINKED])
            ids |= new
            if not new:
                break
        return sorted(found.values(), key=lambda each: each.at)[-MOST_OF_REQUEST:]

    def _read(self, log: str, since: float, lines: int) -> list[LogEntry]:
        # Try the worker's name first, because `worker-a-0-1.log` is the log of the replica `a-0-1`, even if a
        # Deployment `worker-a` exists.
        for stem in (f"{_WORKER}{log}", log):
            path = self.path / f"{stem}.log"
            if path.parent == self.path and path.is_file():
                return self._end(path, log, since, lines)
        return []

    def _end(self, path: Path, log: str, since: float, lines: int) -> list[LogEntry]:
        found: list[LogEntry] = []
        for part in (path, *rotated(path)):
            with contextlib.suppress(OSError):
                if part.stat().st_mtime <= since:
                    break
                found = [*_entries(part, log, since, lines - len(found)), *found]
            if len(found) >= lines or (found and found[0].at <= since):
                break
        return found


def _youngest(found: dict[tuple[str, int], LogEntry]) -> dict[tuple[str, int], LogEntry]:
    """Return the newest lines, up to ``MOST_OF_REQUEST``."""
    return dict(sorted(found.items(), key=lambda each: each[1].at)[-MOST_OF_REQUEST:])


def rotated(path: Path) -> list[Path]:
    """Return the older parts of a log, the newest first: ``x.log.1``, ``x.log.2``."""
    parts = [part for part in path.parent.glob(f"{path.name}.*") if part.suffix[1:].isdecimal()]
    return sorted(parts, key=lambda part: int(part.suffix[1:]))


def _entries(path: Path, log: str, since: float, lines: int) -> list[LogEntry]:
    """Return the last entries of a file.

    The file is read backwards in blocks. Reading ends when there are more than ``lines`` lines, or when a
    line is not newer than ``since``. It also ends after ``MOST_BYTES`` (rounded up to a block), so a very
    large log can give fewer entries.
    """
    with path.open("rb") as file:
        at, data = file.seek(0, 2), b""
        # An incomplete last line is left out below. The next read returns it.
        while at > 0 and len(data) < MOST_BYTES:
            step = min(BLOCK, at)
            at -= step
            file.seek(at)
            data = file.read(step) + data
            if data.count(b"\n") > lines or _first_time(data, whole=at == 0) <= since:
                break
    whole = data[: data.rfind(b"\n") + 1].decode(errors="replace").split("\n")[:-1]
    if at > 0:
        whole = whole[1:]
    before, found = 0.0, []
    for text in whole:
        entry = log_lines.parse(text, log, before)
        before = entry.at
        found.append(entry)
    return _with_times(found)


def _with_times(entries: list[LogEntry]) -> list[LogEntry]:
    """Return the entries. Those before the first entry with a time get the time of this entry."""
    first = next((each.at for each in entries if each.at), 0.0)
    return [each if each.at else each._replace(at=first) for each in entries]


def _first_time(data: bytes, *, whole: bool) -> float:
    """Return the time in the first complete line that states a time; infinity if no line does.

    Only the first 50 lines are searched. ``whole``: True if ``data`` begins with a complete line.
    """
    for text in data.split(b"\n", 50)[0 if whole else 1 : 50]:
        entry = log_lines.parse(text.decode(errors="replace"), "", 0.0)
        if entry.at:
            return entry.at
    return float("inf")


def _lines_with(path: Path, ids: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield the byte offset and the text of each line of a file that contains one of ``ids``."""
    with (
        contextlib.suppress(OSError, ValueError),  # ValueError: the file is empty
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        for wanted in map(log_lines.as_written, ids):
            at = data.find(wanted)
            while at >= 0:
                start, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
                end = len(data) if end < 0 else end
                yield start, data[start:end].decode(errors="replace")
                at = data.find(wanted, end)
