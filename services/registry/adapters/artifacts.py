"""The artifact store: bytes under their sha256, in a folder or an object store.

``<root>/sha256/aa/bb/<digest>`` holds an artifact, ``<root>/incoming/`` what is still being uploaded.
An artifact is moved into place whole, so whoever sees it sees all of it.
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
    """An upload that is complete and hashed, and not yet in its place."""

    sha256: str
    size: int
    path: str


class ArtifactStore:
    """Files by digest. Every method that touches the store does so in a thread."""

    def __init__(self, url: str, *, max_bytes: int) -> None:
        self._fs, self._root, self._stream = object_store.opened(url)
        self._incoming = f"{self._root}/incoming"
        self.max_bytes = max_bytes
        self.problem: str | None = None

    async def start(self) -> None:
        """Make the folders."""
        await self._do(self._fs.makedirs, self._incoming, exist_ok=True)

    async def sweep(self) -> int:
        """Delete what uploads have left behind that broke off more than an hour ago; how many there were."""
        return await self._do(self._sweep)

    async def probe(self) -> None:
        """Find out whether the store can be written; ``problem`` has the answer."""
        try:
            await self._do(self._probe)
        except Unavailable as error:
            log.warning("artifact store probe failed", extra={"problem": error.message})

    async def stage(self, chunks: AsyncIterator[bytes], announced: int | None = None) -> StagedArtifact:
        """Take an upload in, hashing as it comes. ``announced``: the size the sender speaks of.

        Raises PayloadTooLarge as soon as the limit is passed and BadRequest for an upload of nothing;
        then, and when the sender breaks off, nothing stays behind.
        """
        if announced is not None and announced > self.max_bytes:
            raise self._too_large()
        path = f"{self._incoming}/{uuid.uuid4().hex}"
        digest, size = hashlib.sha256(), 0
        file = await self._do(self._fs.open, path, "wb")
        try:
            async for chunk in _gathered(chunks):
                size += len(chunk)
                if size > self.max_bytes:
                    raise self._too_large()
                await self._do(_write, file, digest, chunk)
            if not size:
                raise BadRequest("The upload is empty: send the model's file as the request's body.")
            await self._do(_finish, file)
        except BaseException:
            # Cancelled too: the sender has gone, and half a file helps nobody.
            await asyncio.shield(self._abandon(file, path))
            raise
        return StagedArtifact(digest.hexdigest(), size, path)

    async def keep(self, staged: StagedArtifact) -> None:
        """Move an upload into its place; the same bytes are stored once."""
        await self._do(self._keep, staged)

    async def discard(self, staged: StagedArtifact) -> None:
        """Forget an upload that is not wanted."""
        await self._do(self._delete, staged.path)

    async def remove(self, sha256: str) -> None:
        """Delete an artifact; no error when it is not there."""
        await self._do(self._delete, self._place(sha256))

    async def read(self, sha256: str) -> AsyncIterator[bytes]:
        """The bytes of an artifact in pieces of 1 MiB. Opened before this returns; raises NotFound."""
        try:
            stream = await self._do(self._stream, self._place(sha256))
        except FileNotFoundError:
            raise NotFound(f"The artifact store has no {sha256}.") from None
        return self._pieces(stream)

    @asynccontextmanager
    async def local(self, sha256: str) -> AsyncIterator[Path]:
        """An artifact as a file on this machine: the stored one, or a copy for as long as the block runs."""
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
            raise NotFound(f"The artifact store has no {sha256}.") from None

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
        """Run a blocking call in a thread; what fails raises Unavailable, and FileNotFoundError as it is."""
        try:
            result = await asyncio.to_thread(call, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # each driver has errors of its own
            self.problem = f"The artifact store does not work: {error}."
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
        old = time.time() - ORPHAN_AFTER_S
        try:
            found = self._fs.ls(self._incoming, detail=True)
        except FileNotFoundError:  # an object store has no empty folders
            return 0
        orphans = [
            entry["name"]
            for entry in found
            if entry["type"] == "file" and _written_at(self._fs, entry["name"]) < old
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
            f"The artifact is larger than {self.max_bytes} bytes (TIDEGATE_MAX_ARTIFACT_BYTES)."
        )


def _written_at(fs: Any, path: str) -> float:
    """When a file was last written, in seconds since the epoch; now, where the store cannot say."""
    try:
        return float(fs.modified(path).timestamp())
    except (NotImplementedError, FileNotFoundError):  # the first is fsspec's word for a store without times
        return time.time()


def _write(file: Any, digest: Any, chunk: bytes) -> None:
    digest.update(chunk)
    file.write(chunk)


def _finish(file: Any) -> None:
    """Close a file, and on a local disk have it written through first: a 201 means that it is there."""
    file.flush()
    with suppress(AttributeError, OSError):
        os.fsync(file.fileno())
    file.close()


async def _gathered(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces of at least 1 MiB, so that a thread is worth its while."""
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        if len(held) >= CHUNK:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)
