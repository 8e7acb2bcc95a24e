"""Zip and tar archives, looked into without unpacking them."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from services.registry.domain.archive import Limits, Member, Tally
from tidegate.errors import BadRequest

# tarfile reads a member's extended header in one piece, as large as the archive says it is.
MAX_READ = 4 * 1024 * 1024
# NotImplementedError is zipfile's word for a compression or a version that it does not know.
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, NotImplementedError,
    ValueError, RuntimeError,
)  # fmt: skip


class Contents:
    """The files of an archive by path, and the text of those that were asked for."""

    def __init__(self, files: set[PurePosixPath], texts: dict[PurePosixPath, str]) -> None:
        self.files = files
        self.texts = texts


def look_into(path: Path, *, wanted: Collection[str], max_text: int, limits: Limits) -> Contents:
    """Check every member of an archive and read the files of these names (at most ``max_text`` bytes each).

    Blocking: call it in a thread. Raises BadRequest when it is no archive or holds what is not allowed.
    """
    tally = Tally(limits, path.stat().st_size)
    files: set[PurePosixPath] = set()
    texts: dict[PurePosixPath, str] = {}
    try:
        for member, content in _members(path):
            inside = tally.admit(member)
            if inside is None:
                continue
            files.add(inside)
            if inside.name in wanted:
                with content() as stream:
                    texts[inside] = _text(inside, stream.read(max_text + 1), max_text)
    except _BROKEN as error:
        raise BadRequest(f"The archive cannot be read ({error}): expected zip, tar or tar.gz.") from None
    return Contents(files, texts)


def _text(path: PurePosixPath, content: bytes, limit: int) -> str:
    if len(content) > limit:
        raise BadRequest(f"{str(path)!r} in the archive is larger than {limit} bytes.")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{str(path)!r} in the archive is not UTF-8 text.") from None


class _Opener:
    """Opens one member, as long as its archive is open."""

    def __init__(self, archive: zipfile.ZipFile | tarfile.TarFile, entry: zipfile.ZipInfo | tarfile.TarInfo):
        self._archive, self._entry = archive, entry

    @contextmanager
    def __call__(self) -> Iterator[IO[bytes]]:
        if isinstance(self._archive, zipfile.ZipFile):
            assert isinstance(self._entry, zipfile.ZipInfo)
            with self._archive.open(self._entry) as stream:
                yield stream
            return
        assert isinstance(self._entry, tarfile.TarInfo)
        yield self._archive.extractfile(self._entry) or io.BytesIO()


def _members(path: Path) -> Iterator[tuple[Member, _Opener]]:
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield from _tar(_Capped(unpacked))
        elif magic == b"PK\x03\x04":
            yield from _zip(file)
        else:
            yield from _tar(_Capped(file))


def _zip(file: IO[bytes]) -> Iterator[tuple[Member, _Opener]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            yield Member(info.filename, info.file_size, _zip_kind(info)), _Opener(archive, info)


def _zip_kind(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & 0x1:
        return "encrypted file"
    mode = info.external_attr >> 28  # the file type bits of a Unix mode
    if mode not in (0, 0o4, 0o10):
        return "link" if mode == 0o12 else "special file"
    return "folder" if info.is_dir() else "file"


def _tar(file: _Capped) -> Iterator[tuple[Member, _Opener]]:
    with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
        for info in archive:
            yield Member(info.name, info.size, _tar_kind(info)), _Opener(archive, info)


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.isdir():
        return "folder"
    if info.isreg() and not info.issparse():
        return "file"
    return "link" if info.issym() or info.islnk() else "special file"


class _Capped:
    """A file of which nobody reads more than MAX_READ at once."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_READ:
            raise ValueError("a header of more than 4 MiB")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
