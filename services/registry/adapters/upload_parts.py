"""Store the bytes of uploads in progress.

If the artifact store is a folder, each upload is one file with the path ``<root>/uploads/<id>``. If it is an
object store, each part of an upload is an object: ``<root>/uploads/<id>/<part>``. The database stores which
bytes are committed. All other bytes are overwritten later, or deleted with the upload.
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
        """Write bytes of an upload at an offset, and return the name of the stored part.

        If the store is an object store, each part is an object with a name of its own. If the store is a
        folder, sync the bytes to disk. Then parts have no names, so return an empty name.

        In a folder, write nothing if another registry or task is checking the file now, or has moved it. In
        both cases the upload is complete, and the database would reject this part.
        """
        if not self._is_local:
            # Two connections may write the same part. With a random suffix, neither overwrites the other's
            # bytes. Only one of the two parts is committed.
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
        """Lock an upload's file against writes, so that the ``with`` block can hash and move it.

        Without the lock, a late request to any registry could change bytes after they are checked. Raise
        FileNotFoundError if the file does not exist any more.
        """
        handle = os.open(self.file(upload), os.O_RDWR)
        try:
            if not self._locks(handle, upload, fcntl.LOCK_EX):
                raise FileNotFoundError(self.file(upload))
            yield
        finally:
            os.close(handle)

    def _locks(self, handle: int, upload: str, kind: int) -> bool:
        """Lock the open file of an upload. Return False if the file has been moved.

        ``kind``: flags of ``flock``. With LOCK_NB, also return False if the file is locked already.
        """
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
