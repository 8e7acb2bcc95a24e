"""Submit the lines of a batch as jobs. At most ``WINDOW`` lines are in progress."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from services.gateway.application.access import Access, Grant
from services.gateway.application.jobs.line_forms import LineForm, LineRequest
from services.gateway.application.jobs.submission import JobRequest, JobSubmitter
from services.gateway.domain.batches import Batch, FileChunk
from services.gateway.domain.traffic_split import Origin
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import (
    Conflict,
    Forbidden,
    NoRoutes,
    Overloaded,
    TidegateError,
    TooMany,
    Unauthorized,
    Unavailable,
)
from tidegate.kernel.protocol.access import ANONYMOUS, INFER, SERVICE, Principal, may_not_use
from tidegate.kernel.protocol.jobs import Idempotency

log = telemetry.logger(__name__)

WINDOW = 1024
LINES_AT_A_TIME = 128
RETRY_S = 1.0
# A line may wait for hours until its caller has quota again. No pause between two attempts is longer than
# this, so that a cancellation soon ends the wait.
LONGEST_PAUSE_S = 5.0
# If the batch's file cannot be read for this long, the batch fails.
FILE_TIMEOUT_S = 600.0
_TRY_AGAIN = (Unavailable, Overloaded, NoRoutes, TooMany)
_CANCELLED = Conflict("the batch was cancelled", reason="cancelled")

T = TypeVar("T")


@dataclass(slots=True)
class LineProgress:
    """A line in progress. A submitted line has a job, or the error with which it was refused."""

    number: int
    id: str | None
    job: bytes | None = None
    error: TidegateError | None = None

    @property
    def pending(self) -> bool:
        """Return True until the line is accepted or refused."""
        return self.job is None and self.error is None


class BatchSubmitter:
    """Submits the lines of one batch.

    ``rows``: the lines in progress, in order; the runner removes finished lines from the front.
    ``cancelling``: the runner sets this to end the submission. ``revoked``: the error that ended the
    principal's access, if any.
    """

    def __init__(
        self, batch: Batch, form: LineForm, submitter: JobSubmitter, blobs: Blobs, access: Access
    ) -> None:
        self._batch = batch
        self._form = form
        self._submitter = submitter
        self._blobs = blobs
        self._access = access
        self._principal = _principal(batch)
        self._read = batch.written
        self._lines: deque[bytes] = deque()
        self.chunks: Sequence[FileChunk] = ()
        self.rows: deque[LineProgress] = deque()
        self.cancelling = batch.state == "cancelling"
        self.revoked: TidegateError | None = None

    def begin(self) -> asyncio.Task[bool] | None:
        """Start a task that submits the next lines, and return the task.

        Return None if no line is left, or if ``WINDOW`` lines are in progress.
        """
        room = min(WINDOW - len(self.rows), LINES_AT_A_TIME)
        if room <= 0 or self._read >= self._batch.lines:
            return None
        return asyncio.create_task(self._submit_next(room))

    def check_model(self, model: str) -> None:
        """Raise a TidegateError if a model is not a language model, or if the caller may not use it."""
        endpoint, _ = self._submitter.llm.find(model)
        principal = self._access.recheck(self._principal)
        if not principal.may(INFER, endpoint.name):
            raise Forbidden(may_not_use(principal, endpoint.name))

    def ending(self) -> bool:
        """Return True if no more lines may run: the batch is cancelled, or the caller's key is revoked."""
        try:
            self._access.recheck(self._principal)
        except Unauthorized as error:
            self.revoked = self.revoked or error
        except Unavailable:
            pass  # the gateway has not loaded the keys yet; each line's submission checks the key again
        return self.cancelling or self.revoked is not None

    async def _submit_next(self, count: int) -> bool:
        """Submit the next lines, at most ``count``. Return False if there are no more lines."""
        lines = await self._take(count)
        rows = [LineProgress(self._read + at, self._form.id_of(raw)) for at, raw in enumerate(lines)]
        self._read += len(lines)
        self.rows += rows
        await asyncio.gather(*(self._submit(row, raw) for row, raw in zip(rows, lines, strict=True)))
        return bool(rows)

    async def _take(self, count: int) -> list[bytes]:
        if not self._lines:
            first = 0
            for chunk in self.chunks:
                if first + chunk.lines > self._read:
                    whole = await keep_trying(partial(self._blobs.get, chunk.key), FILE_TIMEOUT_S)
                    lines = [line for line in whole.split(b"\n") if line.strip()]
                    self._lines.extend(lines[self._read - first : chunk.lines])
                    break
                first += chunk.lines
        return [self._lines.popleft() for _ in range(min(count, len(self._lines)))]

    async def _submit(self, row: LineProgress, raw: bytes) -> None:
        key = Idempotency(f"batch {self._batch.id.hex()} {row.number}", hashlib.sha256(raw).digest())
        while not self.ending():
            grant: Grant | None = None
            row.error = self._form.overdue()
            if row.error is not None:
                return
            try:
                line = self._form.read(raw)
                grant = self._access.admit(self._access.recheck(self._principal), line.endpoint)
                request = self._check(row, line, key)
                del line  # free the decoded JSON now: it takes much more memory than the tensors
                submitted = await self._submitter.submit(request)
                row.job = submitted.job.id
                if grant is not None and submitted.fresh:
                    grant.accepted(len(raw))
            except _TRY_AGAIN as error:
                await asyncio.sleep(min(error.retry_after_s or RETRY_S, LONGEST_PAUSE_S))
                continue
            except TidegateError as error:
                row.error = error
            finally:
                if grant is not None:
                    grant.cancel()
            return
        # The batch is ending. An earlier gateway may have submitted this line before it lost the lease. Find
        # that job, so that the runner can cancel it.
        job = await keep_trying(partial(self._submitter.of_key, self._principal.id, key.key))
        if job is None:
            row.error = self.revoked or _CANCELLED
        else:
            row.job = job.id

    def _check(self, row: LineProgress, line: LineRequest, key: Idempotency) -> JobRequest:
        check = (
            partial(self._submitter.check_llm, self._form.path, line.body or {})
            if line.decode is None
            else partial(self._submitter.check, line.model, line.version, line.decode)
        )
        facts = line.facts
        return check(
            line.options,
            self._principal,
            idempotency=key,
            batch=self._batch.id.hex(),
            line=row.number,
            origin=lambda: Origin({}, self._principal.id, lambda: facts),
        )


async def keep_trying(do: Callable[[], Awaitable[T]], timeout_s: float = float("inf")) -> T:
    """Call ``do``, and retry while a store does not answer. Raises Unavailable after ``timeout_s``."""
    give_up_at = time.monotonic() + timeout_s
    while True:
        try:
            return await do()
        except Unavailable as error:
            log.info("a batch waits until a store answers", extra={"problem": error.message})
            if time.monotonic() > give_up_at:
                raise
        await asyncio.sleep(RETRY_S)


def _principal(batch: Batch) -> Principal:
    """Return the principal that submitted the batch."""
    for known in (ANONYMOUS, SERVICE):
        if batch.principal == known.id:
            return known
    endpoints = None if batch.endpoints is None else frozenset(batch.endpoints)
    return Principal(
        batch.principal, batch.principal, frozenset({INFER}), endpoints, batch.weight, batch.role
    )
