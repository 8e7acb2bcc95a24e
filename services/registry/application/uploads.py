"""Uploads that continue after a lost connection, or after a restart of the sender or the registry."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from services.registry.adapters.sql import uploads as rows
from services.registry.application.artifacts import Artifacts
from services.registry.application.transactions import Transactions
from services.registry.domain import uploads
from services.registry.domain.uploads import Upload, UploadLimits
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import TidegateError, Unavailable

log = telemetry.logger(__name__)

# A request that reads the state of an upload may wait until the registry has checked the upload's bytes. It
# waits at most this many seconds.
WAIT_S = 10.0


@dataclass(slots=True)
class _Arrived:
    """Received bytes of one request that are not stored yet.

    ``is_given_up``: True if a later request has replaced this one.
    """

    part: bytearray = field(default_factory=bytearray)
    is_given_up: bool = False

    def taken(self) -> bytearray:
        """Return the bytes, and start again with an empty buffer."""
        taken, self.part = self.part, bytearray()
        return taken

    def give_up(self) -> None:
        """Drop the bytes, and mark the request as replaced by a later one."""
        self.is_given_up, self.part = True, bytearray()


class Uploads:
    """Open uploads, append bytes to them, and turn complete uploads into artifacts.

    The number of stored bytes is in the database. So another registry that shares the database and the store
    can continue the upload.
    """

    def __init__(self, transactions: Transactions, artifacts: Artifacts, limits: UploadLimits) -> None:
        self._transactions = transactions
        self._artifacts = artifacts
        self._store = artifacts.store
        self._limits = limits
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._arrived: dict[str, _Arrived] = {}

    async def open(self, owner: str, sha256: str, size: int) -> tuple[Upload, bool]:
        """Return the caller's upload of these bytes, and True if this call has created it.

        If the caller has an unfinished upload of the same bytes, return that upload. If the artifact is
        stored already, return an upload in the state ``stored``.

        Raise PayloadTooLarge if ``size`` is above the limit of an artifact. Raise TooMany if the caller's
        unfinished uploads would exceed a limit.
        """
        async with self._transactions.change() as writer:
            opened = Upload(uuid.uuid4().hex, owner, sha256, size, writer.now)
            if await self._artifacts.keep_longer(writer, sha256):
                return replace(opened, received=size, stored=True), False
            own = await rows.of_owner(writer.connection, owner)
            if (known := uploads.resumed(own, sha256, size)) is not None:
                return known, False
            uploads.check_new(own, size, self._limits)
            await rows.add(writer.connection, opened, writer.now)
        return opened, True

    async def of(self, owner: str) -> list[Upload]:
        """Return the caller's uploads, oldest first."""
        async with self._transactions.read() as reader:
            return await rows.of_owner(reader.connection, owner)

    async def get(self, owner: str, id_: str) -> Upload:
        """Return an upload. If all bytes have arrived, wait up to ten seconds until they are checked.

        Raise NotFound if the caller has no such upload. Raise Unavailable if the store failed during the
        check.
        """
        upload = await self._find(owner, id_)
        if upload.state != "verifying":
            return upload
        # After a restart of the registry or a failed check, no check is running. So start a new one.
        check = self._checks.get(id_)
        if check is None:
            self._checks[id_] = check = asyncio.create_task(self._finish(upload), name=id_)
            check.add_done_callback(self._on_check_ended)
        await asyncio.wait({check}, timeout=WAIT_S)
        if check.done():
            check.result()
        return await self._find(owner, id_)

    async def append(
        self, owner: str, id_: str, offset: int, chunks: AsyncIterator[bytes], announced: int | None
    ) -> Upload:
        """Append the bytes of one request to an upload, from ``offset`` on. Return the upload.

        ``chunks``: the bytes. ``announced``: the number of bytes that the sender states; None if unknown. If
        the sender disconnects, keep the bytes that have arrived, except a last part below 1 MiB.

        Raise NotFound if the caller has no such upload. Raise BadRequest for too many bytes. Raise Conflict
        in these cases:

        - ``offset`` is not the number of stored bytes.
        - The upload has ended already.
        - A later request has continued the upload.
        """
        upload = await self._find(owner, id_)
        uploads.check_append(upload, offset, announced)
        with self._only_writer(id_) as arrived:
            try:
                async for chunk in chunks:
                    await self._check_only_writer(arrived, upload)
                    arrived.part += chunk
                    if upload.received + len(arrived.part) > upload.size:
                        raise uploads.too_many_bytes(upload)
                    if len(arrived.part) >= uploads.PART_BYTES:
                        upload = await self._commit(upload, arrived.taken())
            except Exception as error:
                if not isinstance(error, TidegateError):
                    # The sender has disconnected. Store the bytes that have arrived, so that the sender can
                    # continue after them.
                    await self._commit_rest(upload, arrived.taken())
                raise
            return await self._commit_rest(upload, arrived.taken())

    async def abort(self, owner: str, id_: str) -> None:
        """Delete an upload and its bytes. Raise NotFound if the caller has no such upload."""
        await self._find(owner, id_)
        async with self._transactions.change() as writer:
            await rows.drop(writer.connection, id_)
        await self._store.do(self._store.parts.delete, id_)

    async def sweep(self) -> None:
        """Delete idle uploads, and stored bytes without an upload. On an error, log it."""
        try:
            async with self._transactions.change() as writer:
                idle = await rows.drop_older(writer.connection, writer.now - self._limits.idle)
            for id_ in idle:
                await self._store.do(self._store.parts.delete, id_)
            # List the stored uploads first and read the rows second. An upload's row is written before its
            # first part. So a listed upload without a row was deleted. It cannot be a new upload.
            listed = await self._store.do(self._store.parts.listed)
            async with self._transactions.read() as reader:
                known = await rows.ids(reader.connection)
            for id_ in listed - known:
                await self._store.do(self._store.parts.delete, id_)
        except Unavailable as error:
            log.warning("uploads not swept", extra={"problem": error.message})

    async def close(self) -> None:
        """Stop the running checks of uploads. The next request for such an upload starts a new check."""
        await tasks.end(*self._checks.values())

    @contextmanager
    def _only_writer(self, id_: str) -> Iterator[_Arrived]:
        """Make this request the only one in this process that appends to an upload.

        Drop the bytes of an earlier request that are not stored yet. The connection of that request may be
        dead. Then its bytes would stay in memory until a timeout.
        """
        if (earlier := self._arrived.get(id_)) is not None:
            earlier.give_up()
        self._arrived[id_] = arrived = _Arrived()
        try:
            yield arrived
        finally:
            if self._arrived.get(id_) is arrived:
                del self._arrived[id_]

    async def _check_only_writer(self, arrived: _Arrived, upload: Upload) -> None:
        """Raise Conflict if a later request has continued the upload."""
        if arrived.is_given_up:
            now = await self._find(upload.owner, upload.id)
            raise uploads.moved(now.received, upload.received)

    async def _find(self, owner: str, id_: str) -> Upload:
        async with self._transactions.read() as reader:
            return uploads.own(await rows.find(reader.connection, id_), id_, owner)

    async def _commit_rest(self, upload: Upload, part: bytearray) -> Upload:
        is_last = upload.received + len(part) == upload.size
        if not part or (len(part) < uploads.LEAST_PART_BYTES and not is_last):
            return upload
        return await self._commit(upload, part)

    async def _commit(self, upload: Upload, part: bytearray) -> Upload:
        """Write a part, then record it in the database.

        The offset is checked twice: before the write, and when the part is recorded. If the store is a
        folder, each upload is one file. Without the first check, late bytes of an earlier request could
        overwrite bytes that are checked already.

        Raise Conflict if another request has appended bytes to the upload in the meantime.
        """
        now = await self._find(upload.owner, upload.id)
        uploads.check_append(now, upload.received, None)
        name = await self._store.do(self._store.parts.write, upload.id, upload.received, part)
        async with self._transactions.change() as writer:
            changed = replace(
                upload,
                received=upload.received + len(part),
                parts=(*upload.parts, name) if name else (),
                touched_at=writer.now,
            )
            if await rows.change(writer.connection, changed, upload.received):
                return changed
            now = uploads.own(await rows.find(writer.connection, upload.id), upload.id, upload.owner)
        raise uploads.moved(now.received, upload.received)

    async def _finish(self, upload: Upload) -> None:
        """Store an upload as an artifact, or mark the upload as failed.

        The upload fails if its bytes are lost, or if their sha256 is not the announced one.
        """
        async with self._transactions.read() as reader:
            is_noted = await reader.artifact_size(upload.sha256) is not None
        is_stored = is_noted and await self._store.has(upload.sha256)
        found = upload.sha256 if is_stored else await self._assembled(upload)
        if found == upload.sha256 and not is_stored:
            await self._artifacts.admit(upload.sha256, upload.size)
        done = uploads.lost(upload) if found is None else uploads.checked(upload, found)
        async with self._transactions.change() as writer:
            await rows.change(writer.connection, done, upload.received)
        await self._store.do(self._store.parts.delete, upload.id)

    async def _assembled(self, upload: Upload) -> str | None:
        """Join the parts of an upload into an artifact. Return the sha256 of the bytes.

        If the sha256 is not the announced one, store no artifact. Return None if the bytes are lost.
        """
        try:
            return await self._store.assemble(upload.id, upload.parts, upload.sha256, upload.size)
        except FileNotFoundError:
            # Another registry may have checked this upload too, and moved its bytes to the path of the
            # artifact.
            return upload.sha256 if await self._store.has(upload.sha256) else None

    def _on_check_ended(self, check: asyncio.Task[None]) -> None:
        self._checks.pop(check.get_name(), None)
        if not check.cancelled() and (error := check.exception()) is not None:
            # The next request for the upload starts the check again.
            log.warning(
                "an upload could not be checked", extra={"upload": check.get_name(), "problem": str(error)}
            )
