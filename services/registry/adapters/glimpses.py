"""Read the parts of a file that are needed to recognise it, in bounded memory. Nothing is executed."""

from __future__ import annotations

from pathlib import Path

from services.registry.adapters import archive_reader, pickle_file
from services.registry.domain import kinds
from services.registry.domain.recognition import HEAD_BYTES, Glimpse, Kind, recognise
from tidegate.kernel import archives
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import ArchiveLimits


def kind_of(path: Path, filename: str, limits: ArchiveLimits) -> Kind | None:
    """Return the kind of a file by its contents; None if no kind fits.

    Blocking: call it in a thread. Raise BadRequest if a tar archive is unsafe. A zip archive is not checked
    here.
    """
    return recognise(read(path, filename, limits), kinds.TABLE)


def read(path: Path, filename: str, limits: ArchiveLimits) -> Glimpse:
    """Return the parts of a file by which its format is recognised.

    These are its name, its size and its first bytes. An archive also has its files. Another compressed file
    also has the first bytes of its unpacked contents.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    glimpse = Glimpse(filename, path.stat().st_size, head)
    if head.startswith(archives.ZIP):
        return _with_members(glimpse, _zip_members(path))
    if _is_tar(head):
        return _with_members(glimpse, _members(path, limits))
    if not head.startswith(kinds.COMPRESSED):
        return glimpse
    unpacked = _unpacked(path)
    if head.startswith(archives.GZIP) and _is_tar(unpacked):
        return _with_members(glimpse, _members(path, limits))
    return Glimpse(filename, glimpse.size, head, unpacked)


def _is_tar(head: bytes) -> bool:
    return head[archives.TAR_AT :].startswith(archives.TAR)


def _with_members(glimpse: Glimpse, members: dict[str, int] | None) -> Glimpse:
    return Glimpse(glimpse.filename, glimpse.size, glimpse.head, b"", members)


def _members(path: Path, limits: ArchiveLimits) -> dict[str, int]:
    contents = archive_reader.read_archive(path, names=(), max_text=0, limits=limits)
    return {str(inner): size for inner, size in contents.sizes.items()}


def _zip_members(path: Path) -> dict[str, int] | None:
    """Return the files of a zip, or None if it is damaged.

    The members are not checked here, because the rules for them depend on the format, which is not known
    yet. The inspection rejects unsafe archives later.
    """
    try:
        with archives.reading():
            return {member.name: member.size for member, _ in archives.members(path) if member.kind == "file"}
    except archives.BrokenArchive:
        return None


def _unpacked(path: Path) -> bytes:
    try:
        return next(pickle_file.pieces(path), b"")[:HEAD_BYTES]
    except BadRequest:
        return b""
