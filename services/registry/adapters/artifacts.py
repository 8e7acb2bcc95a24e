"""The artifact store: files named by their sha256, in a folder or an object store.

The path of an artifact is ``<root>/sha256/aa/bb/<digest>``. Uploads in progress are in ``<root>/incoming/``.
Only complete uploads are moved to the artifact's path, so a stored artifact is always complete.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from services.registry.adapters.upload_parts import UploadParts
from tidegate.kernel import telemetry
from tidegate.kernel.blobs import object_store
from tidegate.kernel.errors import BadRequest, NotFound, PayloadTooLarge, Unavailable

log = telemetry.logger(__name__)

CHUNK = 1024 * 1024
ORPHAN_AFTER_S = 3600.0
# S3 copies at most this many bytes in one call. Larger files are downloaded and uploaded again.
COPY_BYTES = 5 * 10**9

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StagedArtifact:
    """A complete, hashed upload that is not an artifact yet."""

    sha256: str
    size: int
    path: str


class _WrongBytes(Exception):
    """The error for an upload whose bytes do not have the sha256 that the sender stated."""


class ArtifactStore:
    """A store of artifacts by sha256. Its methods work in a thread. They raise Unavailable on an error."""

    def __init__(self, url: str, *, max_bytes: int) -> None:
        self._opened = opened = object_store.opened(url)
        self._fs, self._root, self._stream = opened.files, opened.root, opened.stream
        self._is_local = "file" in self._fs.protocol
        self._incoming = f"{self._root}/incoming"
        self.parts = UploadParts(opened)
        self.max_bytes = max_bytes
        self.problem: str | None = None

    async def start(self) -> None:
        """Create the folder for uploads in progress."""
        await self.do(self._fs.makedirs, self._incoming, exist_ok=True)

    async def sweep(self) -> int:
        """Delete uploads that were cut off more than an hour ago. Return their number."""
        return await self.do(self._sweep)

    async def probe(self) -> None:
        """Test if the store can be written, and record the result in ``problem``. Errors are only logged."""
        try:
            await self.do(self._probe)
        except Unavailable as error:
            log.warning("the artifact store failed its health check", extra={"problem": error.message})

    async def stage(self, chunks: AsyncIterator[bytes], announced: int | None = None) -> StagedArtifact:
        """Write an upload and hash it. ``announced``: the size in bytes, as stated by the sender.

        Raise PayloadTooLarge as soon as the upload exceeds the limit, and BadRequest if it is empty. If an
        error occurs or the sender disconnects, delete the partial upload.
        """
        if announced is not None and announced > self.max_bytes:
            raise self._too_large()
        path = f"{self._incoming}/{uuid.uuid4().hex}"
        digest, size = hashlib.sha256(), 0
        file = await self.do(self._opened.writer, path, self.max_bytes)
        try:
            async for chunk in _in_large_pieces(chunks):
                size += len(chunk)
                if size > self.max_bytes:
                    raise self._too_large()
                await self.do(_write, file, digest, chunk)
            if not size:
                raise BadRequest("The upload is empty. Send the model's file as the body of the request.")
            await self.do(_finish, file)
        except BaseException:
            # BaseException also covers the cancellation when the sender disconnects.
            await asyncio.shield(self._abandon(file, path))
            raise
        return StagedArtifact(digest.hexdigest(), size, path)

    async def keep(self, staged: StagedArtifact) -> None:
        """Move an upload to the artifact's path. If the artifact exists already, delete the upload."""
        await self.do(self._keep, staged)

    async def discard(self, staged: StagedArtifact) -> None:
        """Delete a complete upload that has not become an artifact. Do nothing if it no longer exists."""
        await self.do(self._delete, staged.path)

    async def has(self, sha256: str) -> bool:
        """Return True if the store has an artifact."""
        return await self.do(self._has, sha256)

    async def assemble(self, upload: str, parts: Sequence[str], sha256: str, size: int) -> str:
        """Join the parts of an upload into the artifact ``sha256``. Return the actual sha256 of the bytes.

        If the actual sha256 differs, store no artifact. Raise FileNotFoundError if parts are missing.
        """
        return await self.do(self._assemble, upload, parts, sha256, size)

    async def signed_url(self, sha256: str, lasts: timedelta) -> str | None:
        """Return a URL for a download without credentials; None if the store has no signed URLs."""
        if self._opened.signed is None:
            return None
        return await self.do(self._opened.signed, self._place(sha256), lasts)

    async def remove(self, sha256: str) -> None:
        """Delete an artifact, if it is stored."""
        await self.do(self._delete, self._place(sha256))

    async def read(self, sha256: str, start: int = 0) -> AsyncIterator[bytes]:
        """Open an artifact. Return its bytes from the offset ``start`` on, in pieces of 1 MiB.

        Raise NotFound if the artifact is not stored.
        """
        try:
            stream = await self.do(self._stream, self._place(sha256), start)
        except FileNotFoundError:
            raise NotFound(f"The artifact store has no file {sha256}: upload it again.") from None
        return self._pieces(stream)

    @asynccontextmanager
    async def local(self, sha256: str) -> AsyncIterator[Path]:
        """Yield the path of a local file with the bytes of an artifact.

        If the artifact is in an object store, the file is a copy, which is deleted afterwards. Raise NotFound
        if the artifact is not stored.
        """
        place = self._place(sha256)
        try:
            if self._is_local:
                path = Path(place)
                await self.do(path.stat)
                yield path
                return
            with tempfile.TemporaryDirectory(prefix="tidegate-registry-") as folder:
                copy = Path(folder) / "artifact"
                await self.do(self._download, place, copy)
                yield copy
        except FileNotFoundError:
            raise NotFound(f"The artifact store has no file {sha256}: upload it again.") from None

    async def _pieces(self, stream: object_store.Stream) -> AsyncIterator[bytes]:
        try:
            while piece := await self.do(next, stream.pieces, b""):
                yield piece
        finally:
            await asyncio.shield(asyncio.to_thread(stream.close))

    async def _abandon(self, file: Any, path: str) -> None:
        with suppress(Unavailable):
            await self.do(file.close)
            await self.do(self._delete, path)

    async def do(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in a thread.

        If the call raises FileNotFoundError, raise the same error. After any other error, record it in
        ``problem`` and raise Unavailable.
        """
        try:
            result = await asyncio.to_thread(call, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # each driver has its own exception classes
            self.problem = f"The artifact store has failed: {error}."
            raise Unavailable(self.problem) from error
        self.problem = None
        return result

    def _place(self, sha256: str) -> str:
        return f"{self._root}/sha256/{sha256[:2]}/{sha256[2:4]}/{sha256}"

    def _keep(self, staged: StagedArtifact) -> None:
        place = self._place(staged.sha256)
        self._fs.invalidate_cache()
        if self._fs.exists(place):
            self._delete(staged.path)
            return
        self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        if self._is_local or staged.size <= COPY_BYTES:
            self._fs.mv(staged.path, place)
            return
        self._write_pieces(place, staged.size, self._stream(staged.path))
        self._delete(staged.path)

    def _has(self, sha256: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._place(sha256)))

    def _assemble(self, upload: str, parts: Sequence[str], sha256: str, size: int) -> str:
        digest = hashlib.sha256()
        if self._is_local:
            try:
                with self.parts.unchanging(upload):
                    os.truncate(self.parts.file(upload), size)
                    for piece in self.parts.pieces(upload, parts, size):
                        digest.update(piece)
                    if digest.hexdigest() == sha256:
                        self._keep(StagedArtifact(sha256, size, self.parts.file(upload)))
            except FileNotFoundError:
                if not self._has(sha256):
                    raise
                return sha256  # another registry has stored the artifact
            return digest.hexdigest()

        def checked() -> Iterator[bytes]:
            for piece in self.parts.pieces(upload, parts, size):
                digest.update(piece)
                yield piece
            if digest.hexdigest() != sha256:
                raise _WrongBytes

        # If the bytes are wrong, ``checked`` raises an error, which aborts the multipart upload. So no object
        # with wrong bytes gets the artifact's name.
        with suppress(_WrongBytes):
            self._opened.put(self._place(sha256), size, checked())
        return digest.hexdigest()

    def _download(self, place: str, target: Path) -> None:
        """Copy an object to a local file in pieces.

        fsspec's own function would read the whole object into memory.
        """
        stream = self._stream(place)
        try:
            with target.open("wb") as file:
                for piece in stream.pieces:
                    file.write(piece)
        finally:
            stream.close()

    def _write_pieces(self, place: str, size: int, stream: object_store.Stream) -> None:
        try:
            self._opened.put(place, size, stream.pieces)
        finally:
            stream.close()

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _sweep(self) -> int:
        self._fs.invalidate_cache()
        oldest = time.time() - ORPHAN_AFTER_S
        try:
            entries = self._fs.ls(self._incoming, detail=True)
        except FileNotFoundError:  # an object store does not keep empty folders
            return 0
        orphans = [
            entry["name"]
            for entry in entries
            if entry["type"] == "file" and _written_at(self._fs, entry["name"]) < oldest
        ]
        for path in orphans:
            self._delete(path)
        return len(orphans)

    def _probe(self) -> None:
        path = f"{self._incoming}/probe-{uuid.uuid4().hex}"
        self._fs.makedirs(self._incoming, exist_ok=True)
        self._fs.pipe_file(path, b"probe")
        self._delete(path)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"The artifact is larger than {self.max_bytes} bytes (limit: TIDEGATE_MAX_ARTIFACT_BYTES)."
        )


def _written_at(fs: Any, path: str) -> float:
    """Return when a file was written, in seconds since the epoch.

    If the time is unknown, return the current time, so that a sweep does not delete the file.
    """
    try:
        return float(fs.modified(path).timestamp())
    # A store without times raises NotImplementedError.
    except (NotImplementedError, FileNotFoundError):
        return time.time()


def _write(file: Any, digest: Any, chunk: bytes) -> None:
    digest.update(chunk)
    file.write(chunk)


def _finish(file: Any) -> None:
    """Close a file. If it is on a local disk, sync it first.

    The sync is needed because status 201 promises that the file is stored.
    """
    file.flush()
    with suppress(AttributeError, OSError):
        os.fsync(file.fileno())
    file.close()


async def _in_large_pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the bytes of ``chunks`` in pieces of at least 1 MiB. Only the last piece may be smaller.

    Each piece is written by a call in a thread, so larger pieces need fewer calls.
    """
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        if len(buffer) >= CHUNK:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)
