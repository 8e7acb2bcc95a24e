"""Marks jobs as running in their records, fetches their tensors, and records their results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from services.worker.domain.job_backlog import QueuedJob
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.kernel.protocol import envelope, usage
from tidegate.kernel.protocol.envelope import Reply, Request
from tidegate.kernel.protocol.jobs import Finish, Take, Taken, Terminal
from tidegate.kernel.protocol.redaction import without_paths
from tidegate.kernel.store import JobStore, StoreUnavailable
from tidegate.kernel.store.transitions import JobWait

log = telemetry.logger(__name__)

FETCH_TRIES = 6
MAX_MESSAGE = 4000
# Seconds between two tries to reach a store: the first pause, and the longest pause.
BACKOFF_S = (0.1, 5.0)


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """The end of a job's attempt. It may have a reply, an error, both or none. Times are in seconds.

    ``shared``: the number of jobs in the model call. For a job on a language model, it is the number of
    engine slots. The job's used time is ``compute_s`` divided by this number.
    """

    job: QueuedJob
    state: Terminal
    reply: bytes | Reply = b""
    error: TidegateError | None = None
    wait_s: float = 0.0
    compute_s: float = 0.0
    shared: int = 1


class JobRecords:
    """Reads and writes the records and blobs of jobs, for the worker of ``replica``.

    Results are kept for ``keep_s`` seconds after a job's end.
    """

    def __init__(self, store: JobStore, claims: Claims, replica: str, *, keep_s: float) -> None:
        self._store = store
        self._claims = claims
        self._replica = replica
        self._keep_s = keep_s

    async def take(self, group: Sequence[QueuedJob], *, alone: bool = False) -> list[Taken]:
        """Set the records of jobs to ``running`` in this worker. Return the store's outcome for each job.

        ``alone``: True if the job will run alone in the model. Raises Unavailable if the store fails.
        """
        return await self._store.take(
            [
                Take(
                    job.id,
                    self._replica,
                    job.redelivered,
                    job.request.attempt,
                    token=job.token,
                    lost=job.lost_attempt,
                    alone=alone,
                )
                for job in group
            ]
        )

    async def with_tensors(self, request: Request) -> Request:
        """Return a request with its tensors. Raises Unavailable if the blob store does not return them."""
        if not request.flags & envelope.CLAIM:
            return request
        for tries in range(FETCH_TRIES):
            try:
                data = await self._claims.redeem(request.data)
                return request._replace(data=data, flags=request.flags & ~envelope.CLAIM)
            except Unavailable as error:
                if tries + 1 == FETCH_TRIES:
                    raise
                log.warning("the tensors of a job cannot be fetched yet", extra={"problem": error.message})
                await asyncio.sleep(_backoff(tries))
        raise AssertionError("not reached")

    async def wait(self, group: Sequence[QueuedJob], pause_s: float) -> None:
        """Mark jobs as waiting in their records, wait ``pause_s`` seconds, and mark them as running again.

        If this worker is lost during the wait, the loss does not count as an attempt. If the store does not
        answer after the wait, try again until it has marked the jobs as running.
        """
        for job in group:
            job.waits = True
        try:
            await self._store.waits([JobWait(job.id, job.attempt, True) for job in group])
        except StoreUnavailable as error:
            log.warning("the store did not record that jobs wait", extra={"problem": error.message})
        await asyncio.sleep(pause_s)
        tries = 0
        while left := [job for job in group if not job.ended]:
            try:
                await self._store.waits([JobWait(job.id, job.attempt, False) for job in left])
                break
            except StoreUnavailable as error:
                if tries == 0:
                    log.warning("jobs wait for the store", extra={"problem": error.message})
                await asyncio.sleep(_backoff(tries))
                tries += 1
        for job in group:
            job.waits = False

    async def record(self, ends: Sequence[AttemptEnd]) -> list[bool]:
        """Record durably how attempts ended. Retry until the store answers.

        Return one value for each attempt: True if this worker still had the job.
        """
        finishes = [await self._finish(end) for end in ends]
        tries = 0
        while True:
            try:
                return await self._store.finish(finishes)
            except StoreUnavailable as error:
                if tries == 0:
                    log.warning("results wait for the store", extra={"problem": error.message})
                await asyncio.sleep(_backoff(tries))
                tries += 1

    async def _finish(self, end: AttemptEnd) -> Finish:
        error = {"reason": end.error.reason, "message": _clean(end.error.message)} if end.error else None
        reply = end.reply if isinstance(end.reply, bytes) else await self._store_large(end.reply, end.job)
        tokens_in, tokens_out = _tokens(reply)
        return Finish(
            end.job.id,
            end.job.attempt,
            "expired" if reply is None else end.state,
            reply=reply or b"",
            error=error,
            wait_us=int(max(end.wait_s, 0.0) * 1e6),
            compute_us=int(end.compute_s * 1e6),
            used_us=int(end.compute_s / end.shared * 1e6),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
        )

    async def _store_large(self, reply: Reply, job: QueuedJob) -> bytes | None:
        """Put a large reply into the blob store. Return its frame, which has a claim instead of the data.

        Return None if the blob store was unavailable until the job's deadline.
        """
        tries = 0
        while True:
            try:
                claim = await self._claims.give(reply.data, self._keep_s, durable=True)
                break
            except Unavailable as error:
                if tries == 0:
                    log.warning("a result waits for the blob store", extra={"problem": error.message})
                if job.request.deadline_ms < time.time() * 1e3:
                    return None
                await asyncio.sleep(_backoff(tries))
                tries += 1
        return b"".join(envelope.reply_pieces(reply._replace(data=[claim], claimed=True)))


def _tokens(frame: bytes | None) -> tuple[int, int]:
    """Return the numbers of prompt tokens and of answer tokens that a reply frame contains."""
    if not frame:
        return 0, 0
    _, parameters = envelope.read_result_key(envelope.read_reply(frame).key)
    return usage.tokens(parameters)


def _backoff(tries: int) -> float:
    first, longest = BACKOFF_S
    return min(first * float(1 << min(tries, 10)), longest)


def _clean(message: str) -> str:
    """Return a model server's message without paths, cut to MAX_MESSAGE characters, as valid UTF-8.

    The result is stored in a job's record.
    """
    return without_paths(message)[:MAX_MESSAGE].encode(errors="replace").decode()
