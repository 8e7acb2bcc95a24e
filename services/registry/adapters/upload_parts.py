"""The bytes of uploads in progress: one file in a folder, one object for each part in another store.

``<root>/uploads/<id>`` is such a file, and ``<root>/uploads/<id>/<part>`` such an object. The database says
which bytes count: what a writer has not committed there is written again, or deleted with the upload.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from tidegate.kernel.blobs.object_store import PIECE, Opened


class UploadParts:
    """Writes and reads the parts of uploads. Every method blocks."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._fs = opened.files
        self._folder = f"{opened.root}/uploads"
        self._is_local = "file" in self._fs.protocol

    def file(self, upload: str) -> str:
        """Return the path of an upload: its file, or the folder of its parts."""
        return f"{self._folder}/{upload}"

    def write(self, upload: str, offset: int, data: bytes | bytearray) -> str:
        """Write bytes at an offset, and return the name of the part. They are on disk when this returns."""
        if not self._is_local:
            # The random end keeps the parts of two connections apart. Only one of them is committed.
            name = f"{offset:020d}-{os.urandom(8).hex()}"
            self._fs.pipe_file(f"{self._folder}/{upload}/{name}", data)
            return name
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(self.file(upload), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
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

    def delete(self, upload: str) -> None:
        """Delete the bytes of an upload."""
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):
            self._fs.rm(self.file(upload), recursive=not self._is_local)

    def listed(self) -> set[str]:
        """Return the ids of the uploads that have bytes."""
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._folder, detail=False)
        except FileNotFoundError:  # an object store does not keep empty folders
            return set()
        return {name for entry in entries if (name := entry.rstrip("/").rpartition("/")[2])}
