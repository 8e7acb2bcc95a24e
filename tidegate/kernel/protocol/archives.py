"""Check a model's archive: the kinds and paths of its members, and its limits. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

MAX_PATH = 1024
MAX_DEPTH = 32


class Member(NamedTuple):
    """An entry of an archive, with the size and kind that the archive declares."""

    name: str
    size: int
    kind: str  # "file", "folder", or a description of another kind


class Unsafe(Exception):
    """An archive member that is not allowed. The message names the member and the reason."""


class TooLarge(Unsafe):
    """An archive that exceeds a limit. ``setting``: the registry's setting for this limit."""

    def __init__(self, message: str, setting: str) -> None:
        super().__init__(message)
        self.setting = setting


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """The limits of an archive.

    ``ratio``: the highest ratio of unpacked to packed bytes. It is checked only if the archive has more than
    ``ratio_from_bytes`` unpacked bytes. A small file of blanks can compress 1000 to 1 and is harmless.
    """

    members: int = 10_000
    unpacked_bytes: int = 32 * 1024**3
    ratio: int = 100
    ratio_from_bytes: int = 256 * 1024**2


class ArchiveChecker:
    """Check the members of one archive, in order. Raises :class:`Unsafe` at the first bad member.

    Each member declares its size, and the sum of these sizes is limited. The sizes can be trusted, because
    zipfile and tarfile never read more bytes of a member than it declares.
    """

    def __init__(self, limits: ArchiveLimits, packed_bytes: int) -> None:
        self._limits = limits
        self._packed = max(1, packed_bytes)
        self._count = self._total = 0
        self._paths = Paths()

    def admit(self, member: Member) -> PurePosixPath | None:
        """Return the normalised path of a file, None for a folder."""
        limits = self._limits
        if member.size < 0:
            raise Unsafe(
                f"The archive is damaged: it says that {member.name[:80]!r} has {member.size} bytes. "
                "Pack it again."
            )
        self._count += 1
        self._total += member.size
        if self._count > limits.members:
            raise TooLarge(
                f"The archive has more than {limits.members} entries.", "TIDEGATE_MAX_ARCHIVE_MEMBERS"
            )
        if self._total > limits.unpacked_bytes:
            raise TooLarge(
                f"The archive unpacks to more than {limits.unpacked_bytes} bytes.",
                "TIDEGATE_MAX_UNPACKED_BYTES",
            )
        if self._total > max(limits.ratio_from_bytes, self._packed * limits.ratio):
            raise TooLarge(
                f"The archive unpacks to more than {limits.ratio} times its size.",
                "TIDEGATE_MAX_ARCHIVE_RATIO",
            )
        return self._paths.admit(member)


class Paths:
    """Check the paths of one archive's members, which are passed one by one."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def admit(self, member: Member) -> PurePosixPath | None:
        """Return the normalised path of a file, or None for a folder. Raises :class:`Unsafe`.

        Paths that differ only by case or Unicode form are treated as equal, as some file systems do.
        """
        if member.kind not in {"file", "folder"}:
            raise Unsafe(
                f"The archive's {member.name[:80]!r} is a {member.kind}; only plain files and "
                "folders are accepted."
            )
        path = safe_path(member.name)
        if member.kind == "folder":
            self._begin_folders([path, *path.parents], member)
            return None
        if not path.parts:
            raise Unsafe("The archive has a file without a name.")
        same = _folded(path)
        if same in self._files:
            raise Unsafe(f"The archive has {member.name[:80]!r} twice (case and Unicode form are ignored).")
        if same in self._folders:
            raise Unsafe(f"The archive has {member.name[:80]!r} as a file and as a folder.")
        self._files.add(same)
        self._begin_folders(list(path.parents), member)
        return path

    def _begin_folders(self, folders: list[PurePosixPath], member: Member) -> None:
        for folder in folders:
            same = _folded(folder)
            if same in self._files:
                raise Unsafe(f"The archive has {member.name[:80]!r} below a path that is a file in it.")
            self._folders.add(same)


def home_of(files: Collection[PurePosixPath], name: str) -> PurePosixPath | None:
    """Return the folder that contains the file ``name``, or None.

    The folder is the archive's root, or the only top folder if all files are below it.
    """
    if PurePosixPath(name) in files:
        return PurePosixPath()
    tops = {path.parts[0] for path in files}
    only = PurePosixPath(*tops) if len(tops) == 1 else None
    return only if only is not None and only / name in files else None


def safe_path(name: str) -> PurePosixPath:
    """Return ``name`` as a relative path that stays below its root. Raises :class:`Unsafe`."""
    path = PurePosixPath(name)
    escapes = path.is_absolute() or ".." in path.parts
    controls = any(ord(each) < 32 or ord(each) == 127 for each in name)
    odd = "\\" in name or controls or (len(name) > 1 and name[1] == ":")
    if escapes or odd or len(name) > MAX_PATH or len(path.parts) > MAX_DEPTH:
        raise Unsafe(
            f"The archive's {name[:80]!r} is not a path below its root, or it is too long. "
            "Absolute paths, '..', backslashes, drive letters and control characters are refused. "
            f"A path may have {MAX_PATH} characters and {MAX_DEPTH} parts."
        )
    return path


def _folded(path: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", str(path)).casefold())
