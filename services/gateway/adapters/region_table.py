"""Share the registrations of shared memory among the gateway processes of a host, through a file."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

Entries = dict[tuple[str, str], list[Any]]


class RegionTable:
    """A file of registrations, each under a caller's id and a name. Each change replaces the whole file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None

    def changed(self) -> Entries | None:
        """Return all entries if they may have changed since the last call, else None."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            mark = (0, 0)
        else:
            mark = (found.st_mtime_ns, found.st_ino)
        if mark == self._seen:
            return None
        self._seen = mark
        return self._read()

    def put(self, owner: str, name: str, entry: list[Any]) -> None:
        """Add an entry."""
        with self._locked() as entries:
            entries[owner, name] = entry

    def remove(self, owner: str, name: str) -> None:
        """Remove an entry, or all entries of a caller if ``name`` is empty."""
        with self._locked() as entries:
            for found in [each for each in entries if each[0] == owner and name in ("", each[1])]:
                del entries[found]

    @contextmanager
    def _locked(self) -> Iterator[Entries]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = self._read()
            yield entries
            fresh = self._path.with_suffix(".new")
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(orjson.dumps([[*owned, entry] for owned, entry in entries.items()]))
            fresh.replace(self._path)

    def _read(self) -> Entries:
        try:
            rows = orjson.loads(self._path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return {}
        return {(owner, name): entry for owner, name, entry in rows}
