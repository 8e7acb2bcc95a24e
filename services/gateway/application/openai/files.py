"""Store the files of OpenAI's API: upload, read, list, delete. Callers see only their own files.

A caller with the scope admin sees the files of all callers.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import NamedTuple

from services.gateway.adapters.batch_files import RawLines, RawPiece
from services.gateway.adapters.store.batches import BatchStore
from services.gateway.adapters.store.files import FileStore
from services.gateway.domain.batches import FileChunk
from services.gateway.domain.openai.batches import batch_name
from services.gateway.domain.openai.files import MOST_KEPT_S, Purpose, StoredFile, file_name, no_file
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import BadRequest, Conflict, TooMany, Unavailable
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.jobs import new_id

log = telemetry.logger(__name__)

# Each received piece is in memory twice: as received, and as the chunk to write.
COPIES = 2
SWEEP_S = 60.0
# An upload without new data for this time is deleted, because its gateway has died. A slow caller cannot be
# the cause: HTTP servers end slow uploads earlier.
IDLE_S = 900.0


class FileLimits(NamedTuple):
    """The limits of one file, and of all files of a caller. ``keep_s``: the seconds until a file expires."""

    line_bytes: int
    file_bytes: int
    lines: int
    callers_files: int
    callers_bytes: int
    keep_s: float


class FileUpload:
    """An upload in progress.

    The calling code must call :meth:`finish` or :meth:`abort` at its end. ``hold``: a function that reserves
    memory. It gets the number of bytes in memory, and raises Overloaded if they do not fit.
    """

    def __init__(
        self,
        store: FileStore,
        blobs: Blobs,
        limits: FileLimits,
        principal: Principal,
        used: int,
        hold: Callable[[int], None],
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._limits = limits
        self._principal = principal
        self._used = used
        self._hold = hold
        self._created_ms = int(time.time() * 1e3)
        self._id = new_id(self._created_ms, os.urandom(10))
        self._lines = RawLines(
            line_bytes=limits.line_bytes, total_bytes=limits.file_bytes, lines=limits.lines
        )

    async def write(self, data: bytes) -> None:
        """Store the next bytes. Raises BadRequest, PayloadTooLarge, TooMany, Overloaded or Unavailable."""
        self._hold(COPIES * (self._lines.held + len(data)))
        piece = self._lines.feed(data)
        if self._used + self._lines.size > self._limits.callers_bytes:
            raise _full(f"{self._limits.callers_bytes} bytes")
        await self._put(piece)

    async def finish(self, filename: str, purpose: Purpose, keep_s: float) -> StoredFile:
        """Store the rest of the file, and its record. Raises BadRequest, TooMany or Unavailable."""
        await self._put(self._lines.end())
        if not self._lines.lines:
            raise BadRequest("the file has no lines: a batch needs one JSON request on each line")
        # Check again, because other uploads of this caller may have ended in the meantime.
        used = await used_bytes(self._store, self._principal, self._limits)
        if used + self._lines.size > self._limits.callers_bytes:
            raise _full(f"{self._limits.callers_bytes} bytes")
        file = StoredFile(
            self._id,
            self._principal.id,
            filename,
            purpose,
            self._lines.size,
            self._lines.lines,
            self._created_ms,
            self._created_ms + int(keep_s * 1e3),
        )
        if not await self._store.end_upload(file):
            raise Unavailable("the upload stopped for too long: send the file again")
        return file

    async def abort(self) -> None:
        """Delete the chunks that are already stored."""
        with suppress(Unavailable):  # if a store is down, the background task deletes the chunks later
            await _drop(self._store, self._blobs, self._id)

    async def _put(self, piece: RawPiece | None) -> None:
        if piece is not None:
            key = await self._blobs.put(piece.data, MOST_KEPT_S, durable=True)
            chunk = FileChunk(key, piece.lines, len(piece.data))
            try:
                await self._store.add_chunk(self._id, chunk, MOST_KEPT_S)
            except BaseException:
                with suppress(Unavailable):
                    await self._blobs.delete(key)
                raise


class FileService:
    """Upload, find, list, read and delete the files of all callers."""

    def __init__(self, store: FileStore, batches: BatchStore, blobs: Blobs, limits: FileLimits) -> None:
        self._store = store
        self._batches = batches
        self._blobs = blobs
        self.limits = limits
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the background task that deletes the unfinished uploads of killed gateways."""
        self._task = asyncio.create_task(self._sweep(), name="abandoned uploads")

    async def stop(self) -> None:
        """Stop deleting unfinished uploads, and disconnect from the store."""
        await tasks.end(self._task)
        await self._store.close()

    async def begin(self, principal: Principal, hold: Callable[[int], None]) -> FileUpload:
        """Begin an upload. Raises TooMany if the caller has too many files."""
        used = await used_bytes(self._store, principal, self.limits)
        return FileUpload(self._store, self._blobs, self.limits, principal, used, hold)

    async def find(self, id_: bytes, principal: Principal) -> StoredFile:
        """Return a file. Raises NotFound, unless ``principal`` is its owner or has the scope ``admin``."""
        file = await self._store.get(id_)
        if file is None or not principal.sees(file.principal):
            raise no_file(file_name(id_))
        return file

    async def latest(
        self,
        principal: str | None,
        after: bytes | None,
        limit: int,
        *,
        purpose: str | None,
        oldest_first: bool,
    ) -> list[StoredFile]:
        """Return a page of files, sorted by creation. ``after``: the last id of the previous page.

        ``principal``: the owner; None means all owners.
        """
        return await self._store.latest(principal, after, limit, purpose=purpose, oldest_first=oldest_first)

    async def chunks(self, file: StoredFile) -> list[FileChunk]:
        """Return the chunks of a file."""
        return await self._store.chunks(file.id)

    async def content(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Yield the bytes of a file. Raises Unavailable."""
        for chunk in await self._store.chunks(file.id):
            yield await self._blobs.get(chunk.key)

    async def delete(self, file: StoredFile) -> None:
        """Delete a file. Raises Conflict while a batch reads it."""
        if (reader := await self._batches.reading(file.id)) is not None:
            raise Conflict(
                f"batch {batch_name(reader)} reads file {file_name(file.id)}: cancel the batch, or wait "
                "until it has ended"
            )
        chunks = await self._store.chunks(file.id)
        await self._store.delete(file)
        await asyncio.gather(*(self._blobs.delete(chunk.key) for chunk in chunks))

    async def _sweep(self) -> None:
        while True:
            try:
                for id_ in await self._store.abandoned(IDLE_S):
                    await _drop(self._store, self._blobs, id_)
                    log.info("an unfinished upload was deleted", extra={"file": file_name(id_)})
            except Unavailable:
                pass  # a chunk that was not deleted expires in the blob store
            await asyncio.sleep(SWEEP_S)


async def used_bytes(store: FileStore, principal: Principal, limits: FileLimits) -> int:
    """Return the total size of a caller's files in bytes. Raises TooMany if there are too many files."""
    files = await store.latest(principal.id, None, limits.callers_files)
    if len(files) >= limits.callers_files:
        raise _full(f"{limits.callers_files} files")
    return sum(file.size for file in files)


async def _drop(store: FileStore, blobs: Blobs, id_: bytes) -> None:
    chunks = await store.drop_upload(id_)
    await asyncio.gather(*(blobs.delete(chunk.key) for chunk in chunks))


def _full(limit: str) -> TooMany:
    return TooMany(
        f"this caller's files have reached the limit of {limit}: delete some with DELETE /v1/files/ID",
        reason="storage_full",
    )
