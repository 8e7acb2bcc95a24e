"""The files of drift histories in the state folder: one file for each version."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import orjson

from services.router.adapters import shared_file
from tidegate.kernel import telemetry

log = telemetry.logger(__name__)

VersionKey = tuple[str, int]
_SUFFIX = ".json.z"


class DriftFiles:
    """Reads, writes and removes histories. A file that cannot be read is treated as missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: VersionKey) -> dict[str, Any] | None:
        """Return the document of a version's history; None if its file is missing or cannot be read."""
        try:
            found: dict[str, Any] = orjson.loads(zlib.decompress(self._path(key).read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, zlib.error, ValueError) as error:
            log.warning(
                "a drift history cannot be read", extra={"file": str(self._path(key)), "problem": str(error)}
            )
            return None
        return found

    def write(self, key: VersionKey, document: dict[str, Any]) -> None:
        """Write a version's history to its file.

        If this fails, for example because the disk is full, only log the error. The history stays in memory.
        """
        try:
            shared_file.replace(self._path(key), zlib.compress(orjson.dumps(document), 1))
        except OSError as error:
            log.warning("a drift history could not be written", extra={"problem": str(error)})

    def keep_only(self, keys: Collection[VersionKey]) -> None:
        """Remove the files of all versions except ``keys``."""
        names = {self._path(key).name for key in keys}
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path.name not in names:
                path.unlink(missing_ok=True)

    def _path(self, key: VersionKey) -> Path:
        return self._folder / f"{key[0]}@{key[1]}{_SUFFIX}"
