"""The format of a backup: a tar with plain files, then a manifest with the checksum of each file."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tidegate.stack.errors import StackError

FORMAT = 1
MANIFEST = "manifest.json"
_LONGEST_MANIFEST = 256 * 2**20
_PIECE = 2**20


class BackupError(StackError):
    """A backup could not be made or restored. ``str()`` returns the complete message."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The checksum and the size (bytes) of a file in a backup."""

    sha256: str
    size: int


@dataclass(slots=True)
class Manifest:
    """The list of a backup's files, with facts about its origin.

    ``left_out``: for each part that the backup lacks, the reason.
    """

    format: int = FORMAT
    tidegate: str = ""
    python: str = ""
    created_at: str = ""
    state_dir: str = ""
    database: str = ""
    schema: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    files: dict[str, Stored] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON types."""
        return asdict(self)

    @classmethod
    def parse(cls, raw: bytes) -> Manifest:
        """Return the manifest from its JSON. Raise BackupError if it is unreadable or has another format."""
        try:
            document = json.loads(raw)
            number = document["format"]
            if number != FORMAT:
                raise BackupError(
                    f"The backup has format {number}, and this Tidegate reads format {FORMAT}: use the "
                    f"Tidegate that made it ({document.get('tidegate') or 'unknown'}) or a newer one."
                )
            files = {name: Stored(**each) for name, each in document.pop("files").items()}
            return cls(**{**document, "files": files})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BackupError(f"The manifest of the backup cannot be read: {error!r}.") from None


class Writer:
    """A writer that adds files to a backup, and lists them in ``manifest``.

    A file is added with the length that it has when its copy starts.
    """

    def __init__(self, tar: tarfile.TarFile, manifest: Manifest) -> None:
        self._tar = tar
        self.manifest = manifest

    def add(self, name: str, path: Path) -> bool:
        """Add a file to the backup. Return False if the file no longer exists.

        Leave out data that is appended to the file during the copy.
        """
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return False
        with file:
            self.add_open(name, file)
        return True

    def add_open(self, name: str, file: IO[bytes]) -> None:
        """Add an open file to the backup. Leave out data that is appended to the file during the copy."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = os.fstat(file.fileno()).st_size, 0o600, int(time.time())
        hashing = _Hashing(file)
        try:
            self._tar.addfile(info, hashing)  # type: ignore[arg-type]  # only `read` is used
        except OSError as error:
            if "unexpected end of data" in str(error):
                raise BackupError(
                    f"{name} became shorter while it was read. Start the backup again."
                ) from None
            raise
        self.manifest.files[name] = Stored(hashing.digest.hexdigest(), info.size)


class _Hashing:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self.digest.update(piece)
        return piece


@contextmanager
def written(place: Path, manifest: Manifest) -> Iterator[Writer]:
    """Create a backup file. The block adds files to the backup with the yielded writer.

    The backup appears at ``place`` only when the block has succeeded. Only its owner can read it. It is
    compressed if its name ends with ``.gz`` or ``.tgz``.
    """
    # The temporary name is random. Otherwise, another user with access to the folder could create a link with
    # this name, and so choose where the backup is written.
    descriptor, made = tempfile.mkstemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent)
    part = Path(made)
    try:
        with os.fdopen(descriptor, "wb") as raw:
            with _packing(raw, place) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
                yield Writer(tar, manifest)
                text = json.dumps(manifest.to_json(), indent=1).encode()
                info = tarfile.TarInfo(MANIFEST)
                info.size, info.mode, info.mtime = len(text), 0o600, int(time.time())
                tar.addfile(info, io.BytesIO(text))
            raw.flush()
            os.fsync(raw.fileno())
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _packing(raw: IO[bytes], place: Path) -> Iterator[IO[bytes]]:
    if place.suffix not in {".gz", ".tgz"}:
        yield raw
        return
    with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1) as packed:
        yield packed  # type: ignore[misc]  # a GzipFile is no IO[bytes] to mypy


def verified(place: Path) -> Manifest:
    """Read a backup to its end and return its manifest.

    Raise BackupError if a file is missing, differs from its checksum, or is not in the manifest.
    """
    found: dict[str, Stored] = {}
    manifest: Manifest | None = None
    for name, file, size in _members(place):
        if manifest is not None:
            raise BackupError(f"{place} is damaged: {name!r} comes after the manifest.")
        if name == MANIFEST:
            if size > _LONGEST_MANIFEST:
                raise BackupError(f"{place} is damaged: its manifest has {size} bytes.")
            manifest = Manifest.parse(file.read())
            continue
        _check_name(name)
        digest = hashlib.sha256()
        while piece := file.read(_PIECE):
            digest.update(piece)
        found[name] = Stored(digest.hexdigest(), size)
    if manifest is None:
        raise BackupError(f"{place} is not a backup of Tidegate, or it is incomplete: it has no manifest.")
    wrong = [
        name
        for name in sorted(found.keys() | manifest.files.keys())
        if found.get(name) != manifest.files.get(name)
    ]
    if wrong:
        shown = ", ".join(map(repr, wrong[:3]))
        raise BackupError(
            f"{place} is damaged: {len(wrong)} of {len(manifest.files)} files are missing or differ from "
            f"their checksums ({shown}). Use another copy of the backup."
        )
    return manifest


def extract(place: Path, target_of: Callable[[str], Path], manifest: Manifest) -> None:
    """Write each file of a verified backup to its path.

    Verify the checksums again, because the backup can change after the first verification.
    """
    for name, file, _ in _members(place):
        if name == MANIFEST:
            continue
        target = target_of(name)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        digest = hashlib.sha256()
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            while piece := file.read(_PIECE):
                digest.update(piece)
                out.write(piece)
        if name not in manifest.files or digest.hexdigest() != manifest.files[name].sha256:
            raise BackupError(f"{place} changed while it was read: {name}.")


def _members(place: Path) -> Iterator[tuple[str, IO[bytes], int]]:
    """Yield name, content and size of each file. Raise BackupError if a file cannot be read."""
    try:
        with tarfile.open(place, mode="r|*") as tar:
            for member in tar:
                # Refuse sparse files, because a small backup could then write huge files to the disk. A real
                # backup contains none.
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
                file = tar.extractfile(member) if plain else None
                if file is None:
                    raise BackupError(
                        f"{place} is not a backup of Tidegate: {member.name!r} is not a plain file."
                    )
                yield member.name, _Readable(place, file), member.size  # type: ignore[misc]  # only `read` is used
    except FileNotFoundError:
        raise BackupError(f"There is no file {place}.") from None
    except _UNREADABLE as error:
        raise _unreadable(place, error) from None


_UNREADABLE = (tarfile.TarError, EOFError, OSError, zlib.error)


class _Readable:
    """A file in the tar. Raises BackupError if a read fails."""

    def __init__(self, place: Path, file: IO[bytes]) -> None:
        self._place = place
        self._file = file

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except _UNREADABLE as error:
            raise _unreadable(self._place, error) from None


def _unreadable(place: Path, error: Exception) -> BackupError:
    return BackupError(f"{place} cannot be read as a backup, or it is incomplete: {error}.")


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or str(path) != name:
        raise BackupError(f"The backup names a file outside of its folder: {name!r}.")
