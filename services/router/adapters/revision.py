"""The table's revision (epoch, n), kept over restarts: readers take the greater for the newer."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import orjson


class Revision:
    """``epoch`` is born with the file; ``n`` grows with every change of the table."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.epoch = f"{int(time.time() * 1e3):014d}"
        self.n = 0
        with contextlib.suppress(OSError, ValueError, KeyError):
            kept = orjson.loads(path.read_bytes())
            self.epoch, self.n = kept["epoch"], kept["n"]

    def advance(self) -> None:
        """The next revision, on disk before anybody sees it."""
        self.n += 1
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(orjson.dumps({"epoch": self.epoch, "n": self.n}))
        fresh.replace(self._path)
