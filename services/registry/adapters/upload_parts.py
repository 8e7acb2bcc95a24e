"""The bytes of uploads in progress: a file per upload in a folder, or an object per part in an object store.

The path is ``<root>/uploads/<id>`` for a file, and ``<root>/uploads/<id>/<part>`` for a part. The database
stores which bytes are committed. Other bytes are overwritten later, or deleted with the upload.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from tidegate.kernel.blobs.object_store import PIECE, Opened


class UploadParts:
    """The stored parts of uploads. Every method blocks."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._fs = opened.files
        self._folder = f"{opened.root}/uploads"
        self._is_local = "file" in self._fs.protocol

    def file(self, upload: str) -> str:
        """Return the path of an upload's file, or of the folder with its parts."""
        return f"{self._folder}/{upload}"

    def write(self, upload: str, offset: int, data: bytes | bytearray) -> str:
        """Write bytes at an offset, and return the name of the part. The bytes are synced to disk.

        In a folder, parts have no names, so the returned name is empty. Late bytes for a complete file are
        dropped, because the database would reject them.
        """
        if not self._is_local:
            # Two connections may write the same part. The random suffix separates them, and only one is
            # committed.
            name = f"{offset:020d}-{os.urandom(8).hex()}"
            self._fs.pipe_file(f"{self._folder}/{upload}/{name}", data)
            return name
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(self.file(upload), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            if not self._locks(handle, upload, fcntl.LOCK_SH | fcntl.LOCK_NB):
                return ""
            view = memoryview(data)
            while view:
                written = os.pwrite(handle, view, offset)
                view, offset = view[written:], offset + written
            os.fsync(handle)
        finally:
            os.close(handle)
        return ""

    def pieces(self, upload: str, parts: Sequence[str], size: int) -> Iterator[bytes]:
        """Yield the first ``size`` bytes of an upload, in order. ``parts``: the names of its parts."""
        if self._is_local:
            with Path(self.file(upload)).open("rb") as file:
                for piece in iter(partial(file.read, PIECE), b""):
                    yield piece[: max(0, size - file.tell() + len(piece))]
            return
        for part in parts:
            stream = self._opened.stream(f"{self._folder}/{upload}/{part}")
            try:
                yield from stream.pieces
            finally:
                stream.close()

    @contextmanager
    def unchanging(self, upload: str) -> Iterator[None]:
        """Lock the file of an upload against writes while the block hashes and moves it.

        Otherwise, a late request to any registry could change bytes after their check. Raise
        FileNotFoundError if the file is gone.
        """
        handle = os.open(self.file(upload), os.O_RDWR)
        try:
            if not self._locks(handle, upload, fcntl.LOCK_EX):
                raise FileNotFoundError(self.file(upload))
            yield
        finally:
            os.close(handle)

    def _locks(self, handle: int, upload: str, kind: int) -> bool:
        """Lock the open file of an upload. Return False if it is locked already or has been moved."""
        try:
            fcntl.flock(handle, kind)
            return os.path.samestat(os.fstat(handle), Path(self.file(upload)).stat())
        except (BlockingIOError, FileNotFoundError):
            return False

    def delete(self, upload: str) -> None:
        """Delete the bytes of an upload."""
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):
            self._fs.rm(self.file(upload), recursive=not self._is_local)

    def listed(self) -> set[str]:
        """Return the ids of the uploads that have bytes in the store."""
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._folder, detail=False)
        except FileNotFoundError:  # an object store does not keep empty folders
            return set()
        return {name for entry in entries if (name := entry.rstrip("/").rpartition("/")[2])}
