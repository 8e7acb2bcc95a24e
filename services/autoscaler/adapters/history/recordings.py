"""Recorded arrivals and rounds: ``<state>/data/history.db`` (SQLite).

Arrivals are stored by second for a day, and by minute for four weeks. Rounds of the control loop are stored
in chunks, up to a total size. A self-contained chunk also contains the state before its first round. From
this state, the decisions of its rounds and of later chunks can be computed again.
"""

from __future__ import annotations

import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import orjson

from services.autoscaler.domain.recording import Document
from tidegate.kernel.sqlite_file import Database, Row

MINUTE_S, HOUR_S = 60, 3600
SECONDS_KEPT_S = 24 * HOUR_S
MINUTES_KEPT_S = 28 * 24 * HOUR_S
# The total size is checked only after this many chunks, because a check is slow. Between two checks, the
# chunks can exceed the limit.
COUNT_EVERY = 32

SCHEMA = """
CREATE TABLE IF NOT EXISTS seconds (
    minute INTEGER NOT NULL, deployment TEXT NOT NULL, counts BLOB NOT NULL,
    PRIMARY KEY (deployment, minute)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS seconds_by_minute ON seconds (minute);
CREATE TABLE IF NOT EXISTS minutes (
    hour INTEGER NOT NULL, deployment TEXT NOT NULL, counts BLOB NOT NULL,
    PRIMARY KEY (deployment, hour)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS minutes_by_hour ON minutes (hour);
CREATE TABLE IF NOT EXISTS chunks (
    id INTEGER PRIMARY KEY, first REAL NOT NULL, last REAL NOT NULL, whole INTEGER NOT NULL,
    body BLOB NOT NULL);
"""


class Recordings:
    """The recordings of arrivals and rounds. Several threads may use them; only the leader writes."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.path = path
        self._db = Database(path, SCHEMA)
        self._most_bytes = most_bytes
        self._added = 0

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def add_arrivals(self, counts: Mapping[tuple[str, int], int]) -> None:
        """Add ``counts`` to the recorded arrivals. Its keys are (Deployment, second since the epoch)."""
        fine, coarse = _grouped(counts, MINUTE_S, 1), _grouped(counts, HOUR_S, MINUTE_S)
        self._db.write(
            ("INSERT OR REPLACE INTO seconds VALUES (?, ?, ?)", self._added_to("seconds", "minute", fine)),
            ("INSERT OR REPLACE INTO minutes VALUES (?, ?, ?)", self._added_to("minutes", "hour", coarse)),
        )

    def retire(self, now: float) -> None:
        """Delete arrivals that are too old."""
        self._db.write(
            ("DELETE FROM seconds WHERE minute < ?", [(int(now - SECONDS_KEPT_S) // MINUTE_S,)]),
            ("DELETE FROM minutes WHERE hour < ?", [(int(now - MINUTES_KEPT_S) // HOUR_S,)]),
        )

    def by_second(self, deployment: str, since: int, until: int) -> dict[int, int]:
        """Return the number of arrivals in each second from ``since`` to ``until``.

        The two times and the keys are in seconds since the epoch. Seconds without arrivals are left out.
        """
        rows = self._db.read(
            "SELECT minute, counts FROM seconds WHERE deployment = ? AND minute BETWEEN ? AND ?",
            (deployment, since // MINUTE_S, until // MINUTE_S),
        )
        every = _spread(rows, MINUTE_S, 1)
        return {second: count for second, count in every if count and since <= second < until}

    def by_minute(self, deployment: str, since: int, until: int) -> dict[int, int]:
        """Return the number of arrivals in each minute from ``since`` to ``until``.

        The two times are in seconds since the epoch. The keys are in minutes since the epoch. Minutes without
        arrivals are left out.
        """
        rows = self._db.read(
            "SELECT hour, counts FROM minutes WHERE deployment = ? AND hour BETWEEN ? AND ?",
            (deployment, since // HOUR_S, until // HOUR_S),
        )
        every = _spread(rows, MINUTE_S, 1)
        return {minute: count for minute, count in every if count and since <= minute * MINUTE_S < until}

    def first_second(self, deployment: str) -> int | None:
        """Return the start of the first hour with recorded arrivals; None if no arrivals are recorded.

        The time is in seconds since the epoch.
        """
        rows = self._db.read("SELECT min(hour) FROM minutes WHERE deployment = ?", (deployment,))
        return None if rows[0][0] is None else int(rows[0][0]) * HOUR_S

    def add_chunk(self, first: float, last: float, chunk: Document) -> None:
        """Store a chunk of rounds. If all chunks together are too large, delete the oldest.

        Their total size is checked only once in ``COUNT_EVERY`` chunks. Its limit is the constructor's
        ``most_bytes``.
        """
        body, whole = zlib.compress(orjson.dumps(chunk), 1), chunk["state"] is not None
        statement = "INSERT INTO chunks (first, last, whole, body) VALUES (?, ?, ?, ?)"
        self._db.write((statement, [(first, last, whole, body)]))
        self._added += 1
        if self._added % COUNT_EVERY == 1:
            self._make_room()

    def chunks(self, since: float, until: float) -> Iterator[Document]:
        """Yield the chunks with rounds between ``since`` and ``until``, oldest first.

        The first yielded chunk contains the state from which the decisions can be computed again. So it may
        begin before ``since``. If no chunk contains such a state, all chunks that begin before ``until`` are
        yielded.
        """
        rows = self._db.read(
            "SELECT id FROM chunks WHERE first <= ? AND id >= coalesce("
            "(SELECT max(id) FROM chunks WHERE whole AND first <= ?), "
            "(SELECT min(id) FROM chunks WHERE whole), 0) ORDER BY id",
            (until, since),
        )
        for (id_,) in rows:
            for (body,) in self._db.read("SELECT body FROM chunks WHERE id = ?", (id_,)):
                yield orjson.loads(zlib.decompress(body))

    def span(self) -> tuple[float, float] | None:
        """Return the times of the first and the last recorded round; None without recorded rounds."""
        ((first, last),) = self._db.read("SELECT min(first), max(last) FROM chunks")
        return None if first is None else (first, last)

    def _make_room(self) -> None:
        rows = self._db.read("SELECT id, length(body) FROM chunks ORDER BY id DESC")
        total, gone = 0, []
        for id_, size in rows:
            total += size
            if total > self._most_bytes:
                gone.append((id_,))
        self._db.write(("DELETE FROM chunks WHERE id = ?", gone))

    def _added_to(self, table: str, key: str, counts: Mapping[tuple[str, int], dict[int, int]]) -> list[Row]:
        rows: list[Row] = []
        for (deployment, at), more in counts.items():
            found = self._db.read(
                f"SELECT counts FROM {table} WHERE deployment = ? AND {key} = ?", (deployment, at)
            )
            whole = array("I", found[0][0]) if found else array("I", bytes(60 * array("I").itemsize))
            for place, count in more.items():
                whole[place] += count
            rows.append((at, deployment, whole.tobytes()))
        return rows


def _grouped(
    counts: Mapping[tuple[str, int], int], group_s: int, unit_s: int
) -> dict[tuple[str, int], dict[int, int]]:
    found: dict[tuple[str, int], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for (deployment, second), count in counts.items():
        found[deployment, second // group_s][second % group_s // unit_s] += count
    return found


def _spread(rows: list[Row], size: int, unit: int) -> Iterator[tuple[int, int]]:
    for at, counts in sorted(rows):
        for place, count in enumerate(array("I", counts)):
            yield at * size + place * unit, count
