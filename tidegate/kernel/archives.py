"""Read the members of an archive, for the registry's checks and for the workers' unpacking.

The first bytes decide the format: zip, gzip (with a tar inside), else tar. The whole file must have that
format. Otherwise another program could read the same file as a different archive.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tidegate.kernel.protocol.archives import Member

GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"
TAR, TAR_AT = b"ustar", 257
# The highest number of bytes in one read. tarfile reads a member's extended header in one read. The archive
# states this header's size, so without a limit a bad archive could fill the memory.
MAX_READ = 4 * 2**20
# The highest number of bytes of a zip's directory. zipfile needs ten times as much memory to read it.
MAX_DIRECTORY = 16 * 2**20
# The highest number of zero bytes at the end of a tar. Programs pad a tar's last record with zeros, usually
# up to 10 KiB.
MAX_PADDING, _STEP = 2**20, 2**16

_END, _END_MAGIC = struct.Struct("<4s4H2LH"), b"PK\x05\x06"
_LOCATOR, _LOCATOR_MAGIC = struct.Struct("<4sLQL"), b"PK\x06\x07"
_END64, _END64_MAGIC = struct.Struct("<4sQ2H2L4Q"), b"PK\x06\x06"
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 2**16 - 1
_UNICODE_PATH = 0x7075
# zipfile raises NotImplementedError for an unknown compression or version.
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError, OSError, NotImplementedError,
    ValueError, RuntimeError, OverflowError,
)  # fmt: skip


class BrokenArchive(Exception):
    """The error if a file is not an archive, or contains data besides the archive. The message says why."""


class Opener:
    """A function that opens one member while its archive is open."""

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


def is_packed(path: Path) -> bool:
    """Return True if the first bytes of a file are those of a zip or a tar.gz."""
    with path.open("rb") as file:
        return file.read(4).startswith((GZIP, ZIP))


def is_archive(path: Path) -> bool:
    """Return True if the first bytes of a file are those of a zip, a tar.gz or a tar."""
    with path.open("rb") as file:
        head = file.read(TAR_AT + len(TAR))
    return head.startswith((GZIP, ZIP)) or head[TAR_AT:] == TAR


@contextmanager
def reading() -> Iterator[None]:
    """Convert the libraries' errors for a bad archive to :class:`BrokenArchive`."""
    try:
        yield
    except _BROKEN as error:
        raise BrokenArchive(f"{error or type(error).__name__}: expected zip, tar or tar.gz") from error


def members(path: Path) -> Iterator[tuple[Member, Opener]]:
    """Yield the members of an archive in the archive's order, each with a function that opens it.

    The calling code must run this within :func:`reading`. It must also iterate to the end, because the data
    after a tar is checked last.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(GZIP):
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield from _tar(_Capped(unpacked))
        elif magic == ZIP:
            yield from _zip(file)
        else:
            yield from _tar(_Capped(file))


def check_zip(source: Path | bytes) -> None:
    """Check that ``source`` is a zip and nothing else. Raise :class:`BrokenArchive` if not.

    ``source``: the path of a file, or the file's bytes.
    """
    with reading():
        opened: IO[bytes] = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
        with opened as file:
            if file.read(4) != ZIP:
                raise ValueError("it does not begin like a zip file")
            for _ in _zip(file):
                pass


# --- zip -------------------------------------------------------------------------------------------------


def _zip(file: IO[bytes]) -> Iterator[tuple[Member, Opener]]:
    directory = _directory(file)
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        _check_places(file, infos, directory)
        for info in infos:
            yield Member(info.filename, info.file_size, _zip_kind(info)), Opener(archive, info)


def _directory(file: IO[bytes]) -> int:
    """Return the offset of the zip's directory.

    Raise ValueError if the file does not end with the directory and its end record.
    """
    size = file.seek(0, io.SEEK_END)
    start = max(0, size - _END.size - _MAX_COMMENT)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(_END_MAGIC)
    if at < 0:
        raise ValueError("the zip has no end record")
    *_, length, offset, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise ValueError("there is data after the end of the zip")
    end = start + at
    if end >= _LOCATOR.size:
        length, offset, end = _zip64(file, length, offset, end)
    if length > MAX_DIRECTORY:
        raise ValueError(f"the directory of the zip has {length} bytes; the limit is {MAX_DIRECTORY}")
    if offset + length != end:
        raise ValueError("the zip does not begin at the file's first byte, or has a gap before its end")
    file.seek(0)
    return int(offset)


def _zip64(file: IO[bytes], length: int, offset: int, end: int) -> tuple[int, int, int]:
    """Return the directory's length, offset and end.

    If the zip has a zip64 end record, take the length and the offset from it. Then the directory ends where
    this record begins. Without such a record, return the arguments unchanged.
    """
    file.seek(end - _LOCATOR.size)
    magic, _, at, _ = _LOCATOR.unpack(file.read(_LOCATOR.size))
    if magic != _LOCATOR_MAGIC:
        return length, offset, end
    if at + _END64.size + _LOCATOR.size != end:
        raise ValueError("the zip64 end record is not where it should be")
    file.seek(at)
    magic, *_, length, offset = _END64.unpack(file.read(_END64.size))
    if magic != _END64_MAGIC:
        raise ValueError("the zip has no zip64 end record")
    return length, offset, at


def _check_places(file: IO[bytes], infos: list[zipfile.ZipInfo], directory: int) -> None:
    """Raise ValueError if an entry overlaps another, has two names, or is not where the directory says."""
    free = 0
    for info in sorted(infos, key=lambda each: each.header_offset):
        if info.header_offset < free or (free == 0 and info.header_offset):
            raise ValueError(f"{info.filename[:80]!r} does not begin where the entry before it ends")
        file.seek(info.header_offset)
        magic, _, flags, *_, names, extras = _LOCAL.unpack(file.read(_LOCAL.size))
        raw = file.read(names)
        if magic != ZIP or raw.decode("utf-8" if flags & 0x800 else "cp437") != info.orig_filename:
            raise ValueError(f"{info.filename[:80]!r} has one name in its header, another in the directory")
        if info.orig_filename != info.filename or _second_name(info):
            raise ValueError(f"{info.filename[:80]!r} has two names")
        free = info.header_offset + _LOCAL.size + names + extras + info.compress_size
        if free > directory:
            raise ValueError(f"{info.filename[:80]!r} reaches into the directory")


def _second_name(info: zipfile.ZipInfo) -> bool:
    """Return True if an extra field has a different name for the entry.

    Old versions of zipfile ignore this name, and new versions use it.
    """
    extra = info.extra
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == _UNICODE_PATH and extra[9 : 4 + size] != info.orig_filename.encode():
            return True
        extra = extra[4 + size :]
    return False


def _zip_kind(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & 0x1:
        return "encrypted file"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "file with a compression other than deflate"
    mode = info.external_attr >> 28  # the file type bits of a Unix mode
    if mode not in (0, 0o4, 0o10):
        return "link" if mode == 0o12 else "special file"
    if info.is_dir():
        return "folder" if not info.file_size else "folder with content"
    return "file"


# --- tar -------------------------------------------------------------------------------------------------


def _tar(file: _Capped) -> Iterator[tuple[Member, Opener]]:
    with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
        for info in archive:
            yield Member(info.name, info.size, _tar_kind(info)), Opener(archive, info)
    _check_rest(file)


def _check_rest(file: _Capped) -> None:
    """Raise ValueError unless the rest of a tar is zeros. tarfile would silently ignore other data there."""
    padding = file.last
    for _ in range(MAX_PADDING // _STEP):
        if padding.strip(b"\0"):
            raise ValueError("there is data after the end of the tar")
        padding = file.read(_STEP)
        if not padding:
            return
    raise ValueError(f"there are more than {MAX_PADDING} zeros after the end of the tar")


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.isdir():
        return "folder" if not info.size else "folder with content"
    if info.isreg() and not info.issparse():
        return "file"
    return "link" if info.issym() or info.islnk() else "special file"


class _Capped:
    """A file that refuses reads of more than MAX_READ bytes. ``last`` is the result of the last read."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file = file
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_READ:
            raise ValueError("a header has more than 4 MiB")
        self.last = self._file.read(size)
        return self.last

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
