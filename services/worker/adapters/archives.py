"""Unpack an archive that somebody uploaded, trusting nothing in it."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tidegate.errors import ModelFailed

CHUNK = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """How much an archive may unpack to. ``ratio``: unpacked to packed, from ``ratio_from_bytes`` on."""

    files: int = 10_000
    total_bytes: int = 64 * 1024**3
    ratio: int = 100
    ratio_from_bytes: int = 256 * 1024**2

    def allowed(self, packed_bytes: int) -> int:
        """The bytes that an archive of this size may unpack to."""
        return min(self.total_bytes, max(self.ratio_from_bytes, self.ratio * packed_bytes))


def is_packed(path: Path) -> bool:
    """Whether a file is an archive, by how it begins (gzip or zip)."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"\x1f\x8b", b"PK\x03\x04"))


def unpack(archive: Path, into: Path, limits: Limits | None = None) -> None:
    """Unpack a zip or a tar (also .gz, .bz2, .xz), told apart by its content, into the new folder ``into``.

    Only plain files and folders below ``into`` are written, never a link or a device, and no file's mode is
    kept. Raises ModelFailed for anything else; then ``into`` is gone again.
    """
    limits = limits or Limits()
    into.mkdir(parents=True)
    try:
        _write_all(_entries(archive), into, limits.files, limits.allowed(archive.stat().st_size))
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        OSError,
        RuntimeError,
        NotImplementedError,  # zipfile's word for a compression or a version that it does not know
    ) as problem:
        shutil.rmtree(into, ignore_errors=True)
        raise ModelFailed(f"The archive cannot be unpacked: {problem}") from None
    except ModelFailed:
        shutil.rmtree(into, ignore_errors=True)
        raise


def _write_all(entries: Iterator[tuple[str, IO[bytes]]], into: Path, files: int, total_bytes: int) -> None:
    left = total_bytes
    for number, (name, content) in enumerate(entries, start=1):
        if number > files:
            raise ModelFailed(f"The archive holds more than {files} files.")
        path = into / _inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as output:
            # Counted as they come: the sizes in an archive's own headers are the sender's word.
            while chunk := content.read(CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise ModelFailed(
                        f"The archive unpacks to more than the {total_bytes} bytes allowed for its size."
                    )
                output.write(chunk)


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ModelFailed(f"The archive holds a path that leads out of it: {name!r}.")
    return path


def _entries(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        yield from _zip_entries(archive)
    elif tarfile.is_tarfile(archive):
        yield from _tar_entries(archive)
    else:
        raise ModelFailed("The artifact is neither a zip nor a tar archive.")


def _zip_entries(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ModelFailed(f"The archive holds a link or a device: {info.filename!r}.")
            if info.is_dir():
                _inside(info.filename)
                continue
            with opened.open(info) as content:
                yield info.filename, content


def _tar_entries(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive) as opened:
        for info in opened:
            if info.isdir():
                # "." is how `tar c .` names the root.
                if info.name not in (".", "./"):
                    _inside(info.name)
                continue
            if not info.isreg():
                raise ModelFailed(f"The archive holds a link or a device: {info.name!r}.")
            content = opened.extractfile(info)
            assert content is not None, "a regular file has content"
            with content:
                yield info.name, content
