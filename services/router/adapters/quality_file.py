"""Store the quality histories, and the predictions that wait for labels, in two files.

The file of histories also stores the last read position in the stream of feedback. One atomic write replaces
the histories and the position together. So each label is counted exactly once, even after a crash. The file
of predictions is written less often.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import orjson

from services.router.adapters import shared_file
from tidegate.kernel import telemetry

log = telemetry.logger(__name__)


class QualityFile:
    """The two files on disk. A file that cannot be read is treated as missing."""

    def __init__(self, folder: Path) -> None:
        self._histories = folder / "histories.json.z"
        self._predictions = folder / "predictions.json.z"

    def read(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return the histories (None without a file) and the predictions (empty without a file)."""
        return _read(self._histories), _read(self._predictions) or {}

    def write(self, document: dict[str, Any]) -> bool:
        """Write the histories and the position in the stream of feedback. Return False on an error."""
        return _write(self._histories, document)

    def write_predictions(self, document: dict[str, Any]) -> None:
        """Write the predictions that wait for labels."""
        _write(self._predictions, document)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = orjson.loads(zlib.decompress(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, zlib.error, ValueError) as error:
        log.warning("a quality file cannot be read", extra={"file": str(path), "problem": str(error)})
        return None
    return found


def _write(path: Path, document: dict[str, Any]) -> bool:
    try:
        shared_file.replace(path, zlib.compress(orjson.dumps(document), 1))
    except OSError as error:
        log.warning("a quality file could not be written", extra={"problem": str(error)})
        return False
    return True
