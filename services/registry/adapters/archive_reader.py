"""Zip and tar archives, looked into without unpacking them."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from services.registry.domain.archive_limits import ArchiveChecker, ArchiveLimits
from tidegate.kernel import archives
from tidegate.kernel.errors import BadRequest


class ArchiveContents:
    """The files of an archive by path, with their sizes, and the text of those that were asked for."""

    def __init__(self, files: dict[PurePosixPath, int], texts: dict[PurePosixPath, str]) -> None:
        self.sizes = files
        self.files = files.keys()
        self.texts = texts


def read_archive(
    path: Path, *, wanted: Collection[str], max_text: int, limits: ArchiveLimits
) -> ArchiveContents:
    """Check every member of an archive and read the files of these names (at most ``max_text`` bytes each).

    Blocking: call it in a thread. Raises BadRequest when it is no archive or holds what is not allowed.
    """
    tally = ArchiveChecker(limits, path.stat().st_size)
    files: dict[PurePosixPath, int] = {}
    texts: dict[PurePosixPath, str] = {}
    try:
        with archives.reading():
            for member, content in archives.members(path):
                inside = tally.admit(member)
                if inside is None:
                    continue
                files[inside] = member.size
                if inside.name in wanted:
                    with content() as stream:
                        texts[inside] = _text(inside, stream.read(max_text + 1), max_text)
    except archives.Broken as error:
        raise BadRequest(f"The archive cannot be read ({error}).") from None
    return ArchiveContents(files, texts)


def extract(path: Path, wanted: PurePosixPath, target: Path) -> None:
    """Write one file of an archive that :func:`read_archive` has checked. Blocking."""
    with archives.reading():
        for member, content in archives.members(path):
            if member.kind == "file" and PurePosixPath(member.name) == wanted:
                with content() as packed, target.open("xb") as file:
                    shutil.copyfileobj(packed, file, 1024 * 1024)
                return


def _text(path: PurePosixPath, content: bytes, limit: int) -> str:
    if len(content) > limit:
        raise BadRequest(f"{str(path)!r} in the archive is larger than {limit} bytes.")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{str(path)!r} in the archive is not UTF-8 text.") from None
