"""Unpack an archive of another system into a folder, with the same checks as the registry."""

from __future__ import annotations

import shutil
from pathlib import Path

from tidegate.cli.exit_codes import UsageError
from tidegate.kernel import archives
from tidegate.kernel.protocol.archives import ArchiveChecker, ArchiveLimits, Unsafe


def unpack(archive: Path, into: Path) -> None:
    """Unpack a zip, tar or tar.gz into a new folder.

    Raise UsageError if the archive cannot be read, or if a file in it is not safe to unpack.
    """
    into.mkdir(parents=True)
    try:
        checker = ArchiveChecker(ArchiveLimits(), archive.stat().st_size)
        with archives.reading():
            for member, content in archives.members(archive):
                inside = checker.admit(member)
                if inside is None:
                    continue
                path = into / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                with content() as packed, path.open("xb") as output:
                    shutil.copyfileobj(packed, output, 1024 * 1024)
    except archives.BrokenArchive as problem:
        raise UsageError(f"{archive} cannot be unpacked ({problem}). Download it again.") from None
    except Unsafe as problem:
        raise UsageError(f"{archive}: {problem}") from None
    except OSError as problem:
        raise UsageError(f"{archive}: {problem.strerror}.") from None
