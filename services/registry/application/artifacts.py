"""Uploads of artifacts, and the removal of artifacts that no version uses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta

from services.registry.adapters import metrics
from services.registry.adapters.artifacts import ArtifactStore, StagedArtifact
from services.registry.adapters.sql.writing import DesiredStateWriter
from services.registry.application.transactions import Transactions
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, NotFound, Unavailable

log = telemetry.logger(__name__)

# A signed URL can be opened for this long. Downloads that have begun by then continue.
SIGNED_FOR = timedelta(minutes=10)


class Artifacts:
    """Store artifacts, and maintain their rows in the database."""

    def __init__(
        self,
        transactions: Transactions,
        store: ArtifactStore,
        keep_unused: timedelta,
        *,
        signs_urls: bool = False,
    ) -> None:
        """``keep_unused``: how long an artifact is kept if no version uses it.

        ``signs_urls``: True if replicas should download directly from a store that has signed URLs.
        """
        self._signs_urls = signs_urls
        self._transactions = transactions
        self._keep_unused = keep_unused
        self.store = store

    async def upload(
        self, chunks: AsyncIterator[bytes], *, announced: int | None, expected: str | None
    ) -> StagedArtifact:
        """Store an artifact. The same bytes are stored only once.

        ``announced`` is the size in bytes and ``expected`` is the sha256, both as stated by the sender.
        Raise BadRequest if the sha256 differs, PayloadTooLarge if the artifact exceeds the limit.
        """
        staged = await self.store.stage(chunks, announced)
        try:
            if expected is not None and expected != staged.sha256:
                raise BadRequest(
                    f"The bytes that arrived have sha256 {staged.sha256}, not {expected}. Send the file "
                    "again."
                )
            # Move a new artifact into the store before the transaction, because a long copy must not lock
            # the database.
            async with self._transactions.read() as reader:
                is_known = await reader.artifact_size(staged.sha256) is not None
            if not is_known:
                await self.store.keep(staged)
            await self.admit(staged.sha256, staged.size, staged)
        finally:
            with suppress(Unavailable):
                await asyncio.shield(self.store.discard(staged))
        return staged

    async def admit(self, sha256: str, size: int, staged: StagedArtifact | None = None) -> None:
        """Write an artifact's row. If the artifact is not in the store, move ``staged`` there.

        If ``staged`` is None and the artifact is not in the store, raise Unavailable. This method and
        :meth:`collect` use write transactions, and only one is open at a time. So :meth:`collect` cannot
        delete the artifact after its row is written and before ``staged`` is moved.
        """
        async with self._transactions.change() as writer:
            await writer.note_artifact(sha256, size, writer.now + self._keep_unused)
            if not await self.store.has(sha256):
                if staged is None:
                    raise Unavailable("The artifact was deleted during its upload. Upload it again.")
                await self.store.keep(staged)
        metrics.UPLOADED.inc(size)

    async def keep_longer(self, writer: DesiredStateWriter, sha256: str) -> bool:
        """Keep an artifact for the full ``keep_unused`` time from now, even if no version uses it.

        Return False if the artifact is not stored.
        """
        size = await writer.artifact_size(sha256)
        if size is None or not await self.store.has(sha256):
            return False
        await writer.note_artifact(sha256, size, writer.now + self._keep_unused)
        return True

    async def size(self, sha256: str) -> int:
        """Return the size of an artifact in bytes. Raise NotFound if it is not stored."""
        async with self._transactions.read() as reader:
            size = await reader.artifact_size(sha256)
        if size is None:
            raise NotFound(
                f"No artifact {sha256[:80]!r} is stored here. Upload it first with PUT /v1/artifacts."
            )
        return size

    async def signed_url(self, sha256: str) -> str | None:
        """Return a signed URL that can be opened for ten minutes, or None if signed URLs are not used."""
        return await self.store.signed_url(sha256, SIGNED_FOR) if self._signs_urls else None

    async def collect(self) -> None:
        """Delete unused artifacts, and the files of uploads that were cut off.

        On an error, log it. The next call deletes the rest.
        """
        try:
            await self.store.sweep()
            async with self._transactions.change() as writer:
                for sha256 in await writer.drop_unused_artifacts():
                    await self.store.remove(sha256)
        except Unavailable as error:
            log.warning("artifacts not collected", extra={"problem": error.message})
