"""The route table's revision (epoch, n). A greater revision is newer."""

from __future__ import annotations

import contextlib
from pathlib import Path

import orjson

from services.router.adapters import shared_file


class TableRevision:
    """The revision of a route table.

    ``epoch`` comes from the router's lease. ``n`` counts the table's changes in this epoch. The epoch is also
    stored on disk. So the next epoch is greater, even if the job store loses the lease.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.epoch = 0
        self.n = 0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self.epoch = int(orjson.loads(path.read_bytes())["epoch"])

    @property
    def text(self) -> str:
        """Return the epoch as text of fixed length, so that texts sort like numbers."""
        return f"{self.epoch:014d}"

    def begin(self, epoch: int) -> None:
        """Start a new epoch and store it on disk.

        The calling code must call this before it publishes the first table of the epoch.
        """
        self.epoch, self.n = epoch, 0
        shared_file.replace(self._path, orjson.dumps({"epoch": self.text}))

    def advance(self) -> None:
        """Increment ``n``."""
        self.n += 1
