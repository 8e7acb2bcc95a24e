"""Store the uploaded files of batches, run each batch in one gateway process, and return the results."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress

from services.gateway.adapters.batch_files import LineSplitter, LineWriter
from services.gateway.adapters.store.batches import BatchStore
from services.gateway.application.access import Access
from services.gateway.application.jobs.batch_runner import LEASE_MS, BatchRunner, LeaseLost
from services.gateway.application.jobs.results import JobResults
from services.gateway.application.jobs.submission import JobSubmitter
from services.gateway.application.jobs.tracking import JobTracker
from services.gateway.domain.batch_lines import read_object
from services.gateway.domain.batches import Batch, FileChunk
from services.gateway.domain.job_options import MAX_TTL_S, JobOptions
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import BadRequest, NotFound, TidegateError, Unavailable
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.jobs import new_id
from tidegate.kernel.store import StoreUnavailable
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)

MAX_RUNNING = 4
# A line is in memory twice: as a line, and in its chunk.
COPIES = 2
CLAIM_INTERVAL_S = 1.0


class BatchService:
    """Create, find and cancel batches, and run some of them in this gateway process.

    ``owner``: the name of this process in leases. Times are in seconds.
    """

    def __init__(
        self,
        store: BatchStore,
        submitter: JobSubmitter,
        tracker: JobTracker,
        results: JobResults,
        blobs: Blobs,
        access: Access,
        owner: str,
        *,
        keep_s: float,
    ) -> None:
        self._store = store
        self._submitter = submitter
        self._tracker = tracker
        self._results = results
        self._blobs = blobs
        self._access = access
        self._owner = owner
        self._keep_s = keep_s
        self._wake = asyncio.Event()
        self._running = TaskSet()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start running batches in the background."""
        self._task = asyncio.create_task(self._run(), name="batches")

    async def stop(self) -> None:
        """Stop running batches. Other gateways continue them."""
        await tasks.end(self._task, *self._running)

    async def create(
        self,
        body: AsyncIterator[bytes],
        splitter: LineSplitter,
        model: str,
        version: str,
        options: JobOptions,
        principal: Principal,
        hold: Callable[[int], None],
    ) -> Batch:
        """Store an uploaded file and its batch on disk, and return the batch.

        ``hold``: a function that reserves memory. It gets the number of bytes in memory, and raises
        Overloaded if they do not fit. The method also raises BadRequest and PayloadTooLarge.
        """
        chunks: list[FileChunk] = []
        try:
            await self._store_file(body, splitter, hold, chunks)
            now_ms = int(time.time() * 1e3)
            batch = Batch(
                id=new_id(now_ms, os.urandom(10)),
                state="running",
                principal=principal.id,
                lines=splitter.lines,
                created_ms=now_ms,
                model=model,
                version=version,
                level=options.level,
                ttl_s=options.ttl_s,
                endpoints=None if principal.endpoints is None else tuple(sorted(principal.endpoints)),
                weight=principal.weight,
                role=principal.role,
            )
            await self._store.create(batch, chunks)
        except BaseException:
            for chunk in chunks:
                with suppress(Unavailable):
                    await self._blobs.delete(chunk.key)
            raise
        self.wake()
        return batch

    def wake(self) -> None:
        """Look for a new batch immediately."""
        self._wake.set()

    async def _store_file(
        self,
        body: AsyncIterator[bytes],
        splitter: LineSplitter,
        hold: Callable[[int], None],
        chunks: list[FileChunk],
    ) -> None:
        """Write the body's lines to the blob store, and append their chunks to ``chunks``."""
        # The file is deleted at the end of the batch, and at the latest after the longest ttl of a job.
        writer = LineWriter(self._blobs, MAX_TTL_S)
        async for data in body:
            hold(COPIES * (len(data) + splitter.held + writer.held))
            await _store_lines(splitter.feed(data), splitter, writer, chunks)
        await _store_lines(splitter.end(), splitter, writer, chunks)
        if (last := await writer.write()) is not None:
            chunks.append(last)
        if not chunks:
            raise BadRequest("the file has no lines: send one JSON request on each line")

    async def find(self, id_: bytes, principal: Principal) -> Batch:
        """Return a batch. Raises NotFound, unless ``principal`` is its owner or has the scope ``admin``."""
        batch = await self._store.get(id_)
        if batch is None or not principal.sees(batch.principal):
            raise _not_found(id_)
        return batch

    async def latest(self, principal: str | None, before: bytes | None, limit: int) -> list[Batch]:
        """Return batches, the newest first.

        ``principal``: the owner's id; None means all owners. ``before``: a batch's id, to return only older
        batches; None for no such limit.
        """
        return await self._store.latest(principal, before, limit)

    async def cancel(self, batch: Batch) -> Batch:
        """Cancel the unfinished lines of a batch. Raises NotFound."""
        after = await self._store.cancel(batch.id)
        if after is None:
            raise _not_found(batch.id)
        return after

    async def results(self, batch: Batch) -> AsyncGenerator[bytes]:
        """Yield the written results, in pieces of whole lines. Raises Unavailable."""
        for chunk in await self._store.results(batch.id):
            yield await self._blobs.get(chunk.key)

    async def _run(self) -> None:
        while True:
            try:
                while len(self._running) < MAX_RUNNING and (
                    id_ := await self._store.claim(self._owner, LEASE_MS)
                ):
                    self._running.start(self._run_batch(id_), name=f"batch {id_.hex()}")
            except StoreUnavailable:
                pass
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), CLAIM_INTERVAL_S)

    async def _run_batch(self, id_: bytes) -> None:
        context = {"batch": id_.hex()}
        try:
            batch = await self._store.get(id_)
            if batch is None:
                return
            runner = BatchRunner(
                batch,
                self._owner,
                self._store,
                self._submitter,
                self._tracker,
                self._results,
                self._blobs,
                self._access,
                self._keep_s,
            )
        except StoreUnavailable:
            return  # a gateway takes over the batch when its lease expires
        try:
            await runner.run()
            log.info("a batch has ended", extra=context)
        except LeaseLost:
            log.info("another gateway has taken over a batch", extra=context)
        except asyncio.CancelledError:
            with suppress(LeaseLost, StoreUnavailable):
                await runner.release()
            raise
        except StoreUnavailable:
            pass
        except TidegateError as error:
            log.error("a batch failed", extra=context | {"problem": error.message})
            with suppress(LeaseLost, StoreUnavailable):
                await runner.fail(error.message)
        except Exception:
            log.exception("running a batch failed; a gateway will continue the batch", extra=context)


def _not_found(id_: bytes) -> NotFound:
    return NotFound(f"there is no batch {id_.hex()}: GET /v1/batches lists your batches")


async def _store_lines(
    lines: list[bytes], splitter: LineSplitter, writer: LineWriter, chunks: list[FileChunk]
) -> None:
    if lines and splitter.lines == len(lines):
        try:
            read_object(lines[0])  # refuse a file that is not JSONL before reading the rest
        except BadRequest as error:
            raise BadRequest(f"the file must have one JSON request on each line: {error.message}") from None
    for line in lines:
        if writer.add(line):
            chunk = await writer.write()
            chunks += [chunk] if chunk is not None else []
