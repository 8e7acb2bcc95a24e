"""Read the members of zip and tar archives without unpacking them."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from tidegate.kernel import archives
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import ArchiveChecker, ArchiveLimits, TooLarge, Unsafe


class ArchiveContents:
    """The contents of an archive: the size of each file in bytes, and the requested texts, by path."""

    def __init__(self, files: dict[PurePosixPath, int], texts: dict[PurePosixPath, str]) -> None:
        self.sizes = files
        self.files = files.keys()
        self.texts = texts


def read_archive(
    path: Path, *, names: Collection[str], max_text: int, limits: ArchiveLimits
) -> ArchiveContents:
    """Check every member of an archive, and read the text of each file whose name is in ``names``.

    Blocking: call it in a thread. Raise BadRequest if the file is not an archive, if a member is unsafe or
    too large, or if a text has more than ``max_text`` bytes.
    """
    checker = ArchiveChecker(limits, path.stat().st_size)
    files: dict[PurePosixPath, int] = {}
    texts: dict[PurePosixPath, str] = {}
    try:
        with archives.reading():
            for member, content in archives.members(path):
                inner = checker.admit(member)
                if inner is None:
                    continue
                files[inner] = member.size
                if inner.name in names:
                    with content() as stream:
                        texts[inner] = _text(inner, stream.read(max_text + 1), max_text)
    except archives.BrokenArchive as error:
        raise BadRequest(f"The archive cannot be read ({error}). Pack it again.") from None
    except TooLarge as error:
        raise BadRequest(f"{error} The limit is {error.setting}.") from None
    except Unsafe as error:
        raise BadRequest(str(error)) from None
    return ArchiveContents(files, texts)


def extract(path: Path, inner: PurePosixPath, target: Path) -> None:
    """Write one file of an archive to ``target``. Blocking.

    The archive must have been checked by :func:`read_archive`.
    """
    with archives.reading():
        for member, content in archives.members(path):
            if member.kind == "file" and PurePosixPath(member.name) == inner:
                with content() as packed, target.open("xb") as file:
                    shutil.copyfileobj(packed, file, 1024 * 1024)
                return


def _text(path: PurePosixPath, content: bytes, limit: int) -> str:
    if len(content) > limit:
        raise BadRequest(
            f"{str(path)!r} in the archive is larger than {limit} bytes, the limit for such a file."
        )
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BadRequest(
            f"{str(path)!r} in the archive is not UTF-8 text. Save it as UTF-8 and pack the archive again."
        ) from None
