"""The history of endpoints on disk: ``<state>/data/watch.db`` (SQLite)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.router.domain.watch.history import KEPT, SECONDS, Level, Stored
from tidegate.kernel.sqlite_file import Database

SCHEMA = """
CREATE TABLE IF NOT EXISTS windows (
    level TEXT NOT NULL, start REAL NOT NULL, endpoint TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (level, start, endpoint)) WITHOUT ROWID;
"""


class WatchFile:
    """Stores the figures of each endpoint for each past minute and hour. Only the leader writes.

    Several threads may use it at the same time.
    """

    def __init__(self, path: Path, *, timeout_s: float = 5.0) -> None:
        self.db = Database(path, SCHEMA, owner="router", timeout_s=timeout_s)

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    def windows(self, now: float) -> list[Stored]:
        """Return the stored figures that are not older than ``KEPT`` allows.

        The minutes come before the hours. Each of these two groups is sorted by time, oldest first.
        """
        found: list[Stored] = []
        for level in SECONDS:
            rows = self.db.read(
                "SELECT endpoint, start, body FROM windows WHERE level = ? AND start >= ? ORDER BY start",
                (level, now - _age_s(level)),
            )
            found += [Stored(level, endpoint, start, body) for endpoint, start, body in rows]
        return found

    def add(self, stored: Sequence[Stored], now: float) -> None:
        """Store the figures of past minutes and hours, and delete stored figures that are too old."""
        rows = [(each.level, each.start, each.endpoint, each.body) for each in stored]
        old = [(level, now - _age_s(level)) for level in SECONDS]
        self.db.write(
            ("INSERT OR REPLACE INTO windows VALUES (?, ?, ?, ?)", rows),
            ("DELETE FROM windows WHERE level = ? AND start < ?", old),
        )


def _age_s(level: Level) -> float:
    return KEPT[level] * SECONDS[level]
