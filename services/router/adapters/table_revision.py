"""The table's revision (epoch, n): readers take the greater for the newer."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import orjson


class TableRevision:
    """``epoch`` is that of the router's lease; ``n`` grows with every change of the table in this epoch.

    The epoch is kept on disk. If the store of the jobs is lost, the next epoch will still be greater.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.epoch = 0
        self.n = 0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self.epoch = int(orjson.loads(path.read_bytes())["epoch"])

    @property
    def text(self) -> str:
        """The epoch as the table has it: texts of one length compare as their numbers do."""
        return f"{self.epoch:014d}"

    def begin(self, epoch: int) -> None:
        """Begin a new epoch; it is on disk before a table of it is published."""
        self.epoch, self.n = epoch, 0
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(f".{os.getpid()}")  # other routers write too
        fresh.write_bytes(orjson.dumps({"epoch": self.text}))
        fresh.replace(self._path)

    def advance(self) -> None:
        """Go on to the next revision of this epoch."""
        self.n += 1
