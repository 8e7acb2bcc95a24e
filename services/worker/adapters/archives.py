"""Unpack the archive of a version, with the same safety checks as the registry."""

from __future__ import annotations

import shutil
from pathlib import Path

from tidegate.kernel.archives import BrokenArchive, members, reading
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.archives import ArchiveChecker, ArchiveLimits, Unsafe

CHUNK = 1024 * 1024
LIMITS = ArchiveLimits(unpacked_bytes=64 * 1024**3)


def unpack(archive: Path, into: Path, limits: ArchiveLimits = LIMITS) -> None:
    """Unpack a zip, tar or tar.gz into the new folder ``into``. Blocking.

    Only plain files and folders are written. The permissions in the archive are ignored. If the archive is
    broken, contains anything else or exceeds the limits, this function removes ``into`` and raises
    ModelFailed.
    """
    into.mkdir(parents=True)
    try:
        with reading():
            _write_all(archive, into, ArchiveChecker(limits, archive.stat().st_size))
    except BrokenArchive as problem:
        shutil.rmtree(into, ignore_errors=True)
        raise ModelFailed(f"The archive cannot be unpacked: {problem}") from None
    except Unsafe as problem:
        shutil.rmtree(into, ignore_errors=True)
        raise ModelFailed(str(problem)) from None


def _write_all(archive: Path, into: Path, checker: ArchiveChecker) -> None:
    for member, content in members(archive):
        inside = checker.admit(member)
        if inside is None:
            continue
        path = into / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        with content() as packed, path.open("xb") as output:
            shutil.copyfileobj(packed, output, CHUNK)
