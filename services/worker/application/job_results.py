"""What a job is run on and what it comes to, where that is too large for a message or a record."""

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
from tidegate.kernel.protocol.jobs import Finish, Terminal
from tidegate.kernel.protocol.redaction import without_paths
from tidegate.kernel.store import JobStore, StoreUnavailable

log = telemetry.logger(__name__)

FETCHES = 6
MOST_MESSAGE = 4000
BACKOFF_S = (0.1, 5.0)


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How an attempt ended: with a reply, or with an error, or with neither. Times in seconds.

    ``shared``: so many jobs were in the model call.
    """

    job: QueuedJob
    state: Terminal
    reply: bytes | Reply = b""
    error: TidegateError | None = None
    wait_s: float = 0.0
    compute_s: float = 0.0
    shared: int = 1


class JobResults:
    """Fetches and records. ``keep_s``: how long results are kept after a job's end."""

    def __init__(self, store: JobStore, claims: Claims, *, keep_s: float) -> None:
        self._store = store
        self._claims = claims
        self._keep_s = keep_s

    async def fetched(self, request: Request) -> Request:
        """A request with its tensors. Raises ``Unavailable`` when the blob store does not give them."""
        if not request.flags & envelope.CLAIM:
            return request
        for again in range(FETCHES):
            try:
                data = await self._claims.redeem(request.data)
                return request._replace(data=data, flags=request.flags & ~envelope.CLAIM)
            except Unavailable as error:
                if again + 1 == FETCHES:
                    raise
                log.warning("the tensors of a job cannot be fetched yet", extra={"problem": error.message})
                await asyncio.sleep(_backoff(again))
        raise AssertionError("not reached")

    async def record(self, ends: Sequence[AttemptEnd]) -> list[bool]:
        """Whether these attempts were still ours; by then it is on disk. Waits for a store that is away."""
        finishes = [await self._finish(end) for end in ends]
        again = 0
        while True:
            try:
                return await self._store.finish(finishes)
            except StoreUnavailable as error:
                if again == 0:
                    log.warning("results wait for the store", extra={"problem": error.message})
                await asyncio.sleep(_backoff(again))
                again += 1

    async def _finish(self, end: AttemptEnd) -> Finish:
        error = {"reason": end.error.reason, "message": _clean(end.error.message)} if end.error else None
        reply = end.reply if isinstance(end.reply, bytes) else await self._framed(end.reply, end.job)
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

    async def _framed(self, reply: Reply, job: QueuedJob) -> bytes | None:
        """A large reply as a frame with a claim; the job's record is no place for it.

        None: the blob store was away until the job's time was over.
        """
        again = 0
        while True:
            try:
                claim = await self._claims.give(reply.data, self._keep_s, durable=True)
                break
            except Unavailable as error:
                if again == 0:
                    log.warning("a result waits for the blob store", extra={"problem": error.message})
                if job.request.deadline_ms < time.time() * 1e3:
                    return None
                await asyncio.sleep(_backoff(again))
                again += 1
        return b"".join(envelope.reply_pieces(reply._replace(data=[claim], claimed=True)))


def _tokens(frame: bytes | None) -> tuple[int, int]:
    """Return the tokens that a reply frame says the model read and wrote."""
    if not frame:
        return 0, 0
    _, parameters = envelope.read_result_key(envelope.read_reply(frame).key)
    return usage.tokens(parameters)


def _backoff(again: int) -> float:
    first, longest = BACKOFF_S
    return min(first * float(1 << min(again, 10)), longest)


def _clean(message: str) -> str:
    """A model server's words as they can be recorded: short, and text."""
    return without_paths(message)[:MOST_MESSAGE].encode(errors="replace").decode()
