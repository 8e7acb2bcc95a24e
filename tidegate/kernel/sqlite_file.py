"""A small SQLite database that several threads can share. It runs one call at a time.

Services keep histories in such databases, and can work without them. So if the file is damaged, it is
renamed, and the service starts with a new file.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

# Files with more bytes than this are not checked for damage, because a check would delay the start by more
# than a second.
CHECKED_BYTES = 256 * 2**20

Row = tuple[Any, ...]


class Database:
    """The database at ``path`` with ``schema``. A failed call raises ``Unavailable``.

    ``owner``: the service to which the database belongs, for messages.
    """

    def __init__(self, path: Path, schema: str, *, owner: str = "autoscaler", timeout_s: float = 5.0) -> None:
        self._owner = owner
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._db = _opened(path, schema, timeout_s)
        except sqlite3.OperationalError:  # a locked file or a full disk; the file is not damaged, so keep it
            raise
        except sqlite3.DatabaseError as error:
            aside = _set_aside(path)
            log.error(
                "a damaged database file was renamed, and a new one was created",
                extra={"path": str(path), "aside": str(aside), "problem": str(error)},
            )
            self._db = _opened(path, schema, timeout_s)

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
        """Run each statement once with each of its rows of values. Use one transaction for all statements."""
        try:
            with self._lock, self._db:
                for statement, rows in statements:
                    self._db.executemany(statement, rows)
        except (sqlite3.Error, OverflowError) as error:  # OverflowError: a number has more than 64 bits
            raise Unavailable(f"The {self._owner}'s database cannot be written: {error}.") from error


def _opened(path: Path, schema: str, timeout_s: float) -> sqlite3.Connection:
    """Open a file, and check it if it is not too large. Raise DatabaseError if it is damaged."""
    # Only the file's owner may read the file. It can contain a Deployment's environment, which can contain
    # secrets.
    path.touch(mode=0o600)
    db = sqlite3.connect(path, timeout=timeout_s, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        if path.stat().st_size <= CHECKED_BYTES:
            ((found,),) = db.execute("PRAGMA quick_check(1)").fetchall()
            if found != "ok":
                raise sqlite3.DatabaseError(str(found).strip())
        db.executescript(schema)
    except BaseException:
        db.close()
        raise
    return db


def _set_aside(path: Path) -> Path:
    """Rename a database file and its write-ahead log, so that a new file can have its name.

    Return the new path.
    """
    aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside
