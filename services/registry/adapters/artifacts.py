"""The artifact store: files, each named by its sha256, in a folder or an object store.

``<root>/sha256/aa/bb/<digest>`` is an artifact. ``<root>/incoming/`` has the uploads in progress. Only
complete uploads are moved to their place, so a stored artifact is always complete.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tidegate.kernel import telemetry
from tidegate.kernel.blobs import object_store
from tidegate.kernel.errors import BadRequest, NotFound, PayloadTooLarge, Unavailable

log = telemetry.logger(__name__)

CHUNK = 1024 * 1024
ORPHAN_AFTER_S = 3600.0

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StagedArtifact:
    """A complete, hashed upload that is not yet in its place."""

    sha256: str
    size: int
    path: str


class ArtifactStore:
    """Stores artifacts by sha256. The methods access the store in a thread, and raise Unavailable."""

    def __init__(self, url: str, *, max_bytes: int) -> None:
        self._fs, self._root, self._stream = object_store.opened(url)
        self._incoming = f"{self._root}/incoming"
        self.max_bytes = max_bytes
        self.problem: str | None = None

    async def start(self) -> None:
        """Create the folders."""
        await self._do(self._fs.makedirs, self._incoming, exist_ok=True)

    async def sweep(self) -> int:
        """Delete uploads that were cut off more than an hour ago. Return their number."""
        return await self._do(self._sweep)

    async def probe(self) -> None:
        """Test whether the store can be written, and set ``problem``."""
        try:
            await self._do(self._probe)
        except Unavailable as error:
            log.warning("artifact store probe failed", extra={"problem": error.message})

    async def stage(self, chunks: AsyncIterator[bytes], announced: int | None = None) -> StagedArtifact:
        """Write an upload and hash it. ``announced``: the size in bytes that the sender has stated.

        Raise PayloadTooLarge as soon as the limit is passed, BadRequest for an empty upload. After an error,
        or if the sender disconnects, the partial upload is deleted.
        """
        if announced is not None and announced > self.max_bytes:
            raise self._too_large()
        path = f"{self._incoming}/{uuid.uuid4().hex}"
        digest, size = hashlib.sha256(), 0
        file = await self._do(self._fs.open, path, "wb")
        try:
            async for chunk in _in_large_pieces(chunks):
                size += len(chunk)
                if size > self.max_bytes:
                    raise self._too_large()
                await self._do(_write, file, digest, chunk)
            if not size:
                raise BadRequest("The upload is empty. Send the model's file as the body of the request.")
            await self._do(_finish, file)
        except BaseException:
            # BaseException includes cancellation: the sender has disconnected.
            await asyncio.shield(self._abandon(file, path))
            raise
        return StagedArtifact(digest.hexdigest(), size, path)

    async def keep(self, staged: StagedArtifact) -> None:
        """Move an upload into its place. The same bytes are stored once."""
        await self._do(self._keep, staged)

    async def discard(self, staged: StagedArtifact) -> None:
        """Delete an upload."""
        await self._do(self._delete, staged.path)

    async def remove(self, sha256: str) -> None:
        """Delete an artifact, if it is stored."""
        await self._do(self._delete, self._place(sha256))

    async def read(self, sha256: str) -> AsyncIterator[bytes]:
        """Open an artifact and return its bytes in pieces of 1 MiB. Raise NotFound."""
        try:
            stream = await self._do(self._stream, self._place(sha256))
        except FileNotFoundError:
            raise NotFound(f"The artifact store has no file {sha256}: upload it again.") from None
        return self._pieces(stream)

    @asynccontextmanager
    async def local(self, sha256: str) -> AsyncIterator[Path]:
        """Provide an artifact as a local file for the block. A copy is deleted after the block.

        Raise NotFound.
        """
        place = self._place(sha256)
        try:
            if "file" in self._fs.protocol:
                path = Path(place)
                await self._do(path.stat)
                yield path
                return
            with tempfile.TemporaryDirectory(prefix="tidegate-registry-") as folder:
                copy = Path(folder) / "artifact"
                await self._do(self._fs.get_file, place, str(copy))
                yield copy
        except FileNotFoundError:
            raise NotFound(f"The artifact store has no file {sha256}: upload it again.") from None

    async def _pieces(self, stream: object_store.Stream) -> AsyncIterator[bytes]:
        try:
            while piece := await self._do(next, stream.pieces, b""):
                yield piece
        finally:
            await asyncio.shield(asyncio.to_thread(stream.close))

    async def _abandon(self, file: Any, path: str) -> None:
        with suppress(Unavailable):
            await self._do(file.close)
            await self._do(self._delete, path)

    async def _do(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in a thread. Errors become Unavailable, except FileNotFoundError."""
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
        self._fs.mv(staged.path, place)

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
    """Return when a file was written, in seconds since the epoch. If that is unknown, return the time now."""
    try:
        return float(fs.modified(path).timestamp())
    # A store without times raises NotImplementedError.
    except (NotImplementedError, FileNotFoundError):
        return time.time()


def _write(file: Any, digest: Any, chunk: bytes) -> None:
    digest.update(chunk)
    file.write(chunk)


def _finish(file: Any) -> None:
    """Close a file. On a local disk, sync it first, because a 201 means that it is stored."""
    file.flush()
    with suppress(AttributeError, OSError):
        os.fsync(file.fileno())
    file.close()


async def _in_large_pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the same bytes in pieces of 1 MiB or more: each piece is written by a call in a thread."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        if len(buffer) >= CHUNK:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)
