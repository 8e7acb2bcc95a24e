"""A small SQLite database with one writer and short calls, which several threads may use."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidegate.kernel.errors import Unavailable

Row = tuple[Any, ...]


class Database:
    """The database at ``path`` with ``schema``. A failed call raises ``Unavailable``.

    ``owner``: the service that it belongs to, for messages.
    """

    def __init__(self, path: Path, schema: str, *, owner: str = "autoscaler", timeout_s: float = 5.0) -> None:
        self._owner = owner
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # a Deployment's environment may hold secrets
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=timeout_s, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(schema)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def read(self, query: str, values: Row = ()) -> list[Row]:
        """Return the rows of a query."""
        try:
            with self._lock:
                return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise Unavailable(f"The {self._owner}'s database cannot be read: {error}.") from error

    def write(self, *statements: tuple[str, Sequence[Row]]) -> None:
        """Run each statement for each of its rows, in one transaction."""
        try:
            with self._lock, self._db:
                for statement, rows in statements:
                    self._db.executemany(statement, rows)
        except (sqlite3.Error, OverflowError) as error:  # OverflowError: a number of more than 64 bits
            raise Unavailable(f"The {self._owner}'s database cannot be written: {error}.") from error
