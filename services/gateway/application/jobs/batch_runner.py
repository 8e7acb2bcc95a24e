"""Run a batch: submit its lines as jobs, a few at a time, and write the results in line order.

The gateway that runs a batch holds a lease on it. It writes the results to the blob store in chunks. The
batch's record contains the number of lines whose results are written. If another gateway takes over the
batch, it continues after these lines. The job of each line has an idempotency key, so a line that is
submitted twice becomes only one job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice, takewhile

import orjson

from services.gateway.adapters.store.batches import NO_CHUNKS, BatchStore
from services.gateway.application.access import Access
from services.gateway.application.jobs.batch_submitter import (
    FILE_TIMEOUT_S,
    LINES_AT_A_TIME,
    BatchSubmitter,
    LineProgress,
    keep_trying,
)
from services.gateway.application.jobs.batch_writer import BatchWriter, Written
from services.gateway.application.jobs.line_forms import ResultLine, line_form
from services.gateway.application.jobs.results import JobResults
from services.gateway.application.jobs.submission import JobSubmitter
from services.gateway.application.jobs.tracking import JobTracker
from services.gateway.domain.batches import Batch, BatchState
from services.gateway.domain.job_results import failure_of
from services.gateway.domain.openai.lines import FileCheck
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import Conflict, TidegateError, Unavailable
from tidegate.kernel.protocol.jobs import Job

log = telemetry.logger(__name__)

LEASE_MS = 10_000
RENEW_S = 1.0
SAVE_S = 5.0
RESULT_BYTES = 4 * 2**20
PAUSES_S = (0.005, 0.25)
# If a result in the blob store cannot be read for this long, its line fails.
RESULT_TIMEOUT_S = 30.0


class LeaseLost(Exception):
    """Another gateway has the lease of the batch."""


class BatchRunner:
    """Runs one batch, from its saved progress to its end. Results are kept for ``keep_s`` seconds."""

    def __init__(
        self,
        batch: Batch,
        owner: str,
        store: BatchStore,
        submitter: JobSubmitter,
        tracker: JobTracker,
        results: JobResults,
        blobs: Blobs,
        access: Access,
        keep_s: float,
    ) -> None:
        self._batch = batch
        self._owner = owner
        self._store = store
        self._tracker = tracker
        self._blobs = blobs
        self._form = line_form(batch, results)
        self._submitter = BatchSubmitter(batch, self._form, submitter, blobs, access)
        self._keep_s = keep_s
        self._writer = BatchWriter(batch, blobs, keep_s)
        self._done = self._written = batch.written
        self._rows = self._submitter.rows
        self._saved_counts = dict(batch.counts)
        self._size = batch.size
        self._saved_at = time.monotonic()
        self._step_lock = asyncio.Lock()
        self._lines_revoked = False  # True if a line failed after its caller's access was revoked

    async def run(self) -> None:
        """Run the batch to its end.

        Raise :class:`LeaseLost` if another gateway has the lease of the batch. Raise Unavailable if the
        batch's file cannot be read.
        """
        self._submitter.chunks = await self._store.lines(self._batch.id)
        work = asyncio.create_task(self._process_lines())
        keep = asyncio.create_task(self._keep_lease())
        try:
            await asyncio.wait({work, keep}, return_when=asyncio.FIRST_COMPLETED)
            for task in (work, keep):
                if task.done():
                    task.result()
        finally:
            await tasks.end(work, keep)

    async def release(self) -> None:
        """End the lease, so that another gateway can continue the batch immediately."""
        await self._step(lease_ms=0)

    async def _process_lines(self) -> None:
        if (errors := await self._check_file()) is not None:
            await self._end("failed", errors)
            return
        pause = PAUSES_S[0]
        beginning: asyncio.Task[bool] | None = None
        try:
            while self._done < self._batch.lines:
                # New lines may wait for hours until their caller has quota again. So submit lines in the
                # background, and meanwhile write the results of earlier lines.
                beginning = beginning or self._submitter.begin()
                moved = await self._write_results()
                if self._writer.held and time.monotonic() - self._saved_at > SAVE_S:
                    await self._save()
                if beginning is not None and beginning.done():
                    moved |= beginning.result()
                    beginning = None
                pause = PAUSES_S[0] if moved else min(pause * 2, PAUSES_S[1])
                if not moved:
                    await (asyncio.wait({beginning}, timeout=pause) if beginning else asyncio.sleep(pause))
        finally:
            await tasks.end(beginning)
        await self._save()
        end: BatchState = "cancelled" if self._submitter.cancelling else "completed"
        error = ""
        if self._lines_revoked and self._submitter.revoked is not None:
            end, error = "failed", self._submitter.revoked.message
        elif end == "completed" and self._batch.openai is not None and self._writer.counts["expired"]:
            end = "expired"
        await self._end(end, error)

    async def _end(self, end: BatchState, error: str) -> None:
        async with self._step_lock:
            await keep_trying(partial(self._step, end=end, error=error))
        if self._batch.openai is None:  # a file of OpenAI's API stays until its caller deletes it
            await asyncio.gather(*(self._blobs.delete(chunk.key) for chunk in self._submitter.chunks))

    async def _check_file(self) -> str | None:
        """Check the file of a batch of OpenAI's API. Return the errors as JSON, or None if there are none."""
        if self._batch.openai is None or self._batch.validated_ms:
            return None
        check = FileCheck(self._batch.openai.endpoint, self._submitter.check_model)
        for chunk in self._submitter.chunks:
            whole = await keep_trying(partial(self._blobs.get, chunk.key), FILE_TIMEOUT_S)
            check.add(whole.removesuffix(b"\n").split(b"\n"))
            await asyncio.sleep(0)  # let the event loop serve requests
        if check.errors:
            return orjson.dumps([error.public() for error in check.errors]).decode()
        await keep_trying(partial(self._store.validated, self._batch.id, check.model))
        return None

    async def fail(self, error: str) -> None:
        """End the batch as failed. Results that were written are kept."""
        await self._step(end="failed", error=error)

    async def _write_results(self) -> bool:
        """Pass the results of finished lines to the writer. Return False if no result was passed.

        Stop at the first unfinished line, because results are written in line order.
        """
        if not self._rows:
            return False
        # Results are written in line order. So check the other lines only after the first one has finished.
        first = self._rows[0]
        if first.error is None and not await self._finished_rows([first]):
            return False
        finished = await self._finished_rows(list(islice(self._rows, LINES_AT_A_TIME)))
        while finished:
            group = finished[: self._fitting_in_memory(finished)]
            finished = finished[len(group) :]
            ids = [job.id for _, job in group if job is not None and _has_answer(job)]
            replies = await keep_trying(partial(self._store.replies, ids))
            frames: dict[bytes, bytes | None] = dict(zip(ids, replies, strict=True))
            for row, job in group:
                result = await self._result_line(row, job, frames.get(row.job or b""))
                self._lines_revoked |= self._submitter.revoked is not None and result.outcome != "succeeded"
                full = self._writer.add(result)
                self._rows.popleft()
                self._done += 1
                if full:
                    await self._save()
        return True

    async def _finished_rows(self, rows: Sequence[LineProgress]) -> list[tuple[LineProgress, Job | None]]:
        """Return the finished lines before the first unfinished line, with their jobs."""
        rows = list(takewhile(lambda row: not row.pending, rows))
        ids = [row.job for row in rows if row.job is not None]
        jobs = dict(zip(ids, await keep_trying(partial(self._tracker.store.get_many, ids)), strict=True))
        pairs = [(row, jobs[row.job] if row.job is not None else None) for row in rows]
        return list(takewhile(lambda pair: pair[1] is None or pair[1].terminal, pairs))

    @staticmethod
    def _fitting_in_memory(finished: Sequence[tuple[LineProgress, Job | None]]) -> int:
        """Return how many of the first results are loaded into memory in one step.

        These results have at most ``RESULT_BYTES`` bytes together. At least one result is loaded, even if it
        is larger.
        """
        size = 0
        for at, (_, job) in enumerate(finished):
            size += job.result_size if job is not None else 0
            if at and size > RESULT_BYTES:
                return at
        return len(finished)

    async def _result_line(self, row: LineProgress, job: Job | None, frame: bytes | None) -> ResultLine:
        """Return the result of a finished request line: its outcome, and the line for the results file."""
        error = row.error
        if job is not None and frame is not None:
            try:
                answered = partial(self._form.answered, row.number, row.id, job, frame)
                return await keep_trying(answered, RESULT_TIMEOUT_S)
            except TidegateError as problem:
                error = problem
        elif job is not None and job.state != "succeeded":
            error = failure_of(job)
        if error is None:
            error = Conflict("the job's record was deleted before its result was written", reason="job_gone")
        if error.reason == "cancelled" and not self._submitter.cancelling:
            error = self._form.overdue() or error  # the job was cancelled because the batch is overdue
        outcome = error.reason if error.reason in {"cancelled", "expired"} else "failed"
        job_id = None if row.job is None else row.job.hex()
        return self._form.failed(row.number, row.id, job_id, outcome, error)

    async def _save(self) -> None:
        """Write the collected results to the blob store, and add their chunk to the batch's record."""
        written = await keep_trying(self._writer.write)
        self._saved_at = time.monotonic()
        if written is None:
            return
        async with self._step_lock:
            self._written, self._size = self._done, self._size + written.size
            self._saved_counts = dict(self._writer.counts)
            await keep_trying(partial(self._step, written))

    async def _keep_lease(self) -> None:
        """Renew the lease and save the progress. Cancel the jobs of a cancelled or overdue batch."""
        while True:
            await asyncio.sleep(RENEW_S)
            async with self._step_lock:
                try:
                    await self._step()
                except Unavailable:
                    continue
            if self._submitter.ending() or self._form.overdue() is not None:
                await self._tracker.cancel_all([row.job for row in self._rows if row.job is not None])

    async def _step(
        self,
        written: Written | None = None,
        lease_ms: int = LEASE_MS,
        end: BatchState | None = None,
        error: str = "",
    ) -> None:
        """Save the progress, and renew the lease. Raises :class:`LeaseLost`.

        ``lease_ms``: the time until the lease ends, in milliseconds. ``end``: the state in which the batch
        ends; None means that it goes on.
        """
        state = await self._store.step(
            self._batch.id,
            self._owner,
            lease_ms,
            done=self._done,
            written=self._written,
            counts=self._saved_counts,
            size=self._size,
            chunk=written.chunk if written is not None else None,
            file_chunks=written.files if written is not None else NO_CHUNKS,
            files=self._writer.files(self._saved_counts) if end is not None else (),
            end=end,
            error=error,
            keep_s=int(self._keep_s),
        )
        if state is None:
            raise LeaseLost
        self._submitter.cancelling = state == "cancelling"


def _has_answer(job: Job) -> bool:
    """Return True if a job has a result: it succeeded, or a language model refused its request."""
    return job.state == "succeeded" or (job.state == "failed" and job.result_size > 0)
