"""Write the answers of asynchronous inference to the store, after the jobs have ended."""

from __future__ import annotations

import time

import orjson
from prometheus_client import Counter

from services.gateway.adapters.async_store import AsyncStore
from services.gateway.adapters.store.async_outputs import AsyncOutputStore
from services.gateway.application.jobs.results import JobResults
from services.gateway.domain.async_inference import AnswerPlan, failure_key, output_key
from services.gateway.domain.job_results import failure_of
from services.gateway.domain.rows.typed_body import encoded
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.kernel.protocol.jobs import Job
from tidegate.kernel.protocol.redaction import for_caller
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import JobStore, StoreUnavailable

log = telemetry.logger(__name__)

WRITTEN = Counter(
    "tidegate_gateway_async_answers_total", "Answers of asynchronous inference, by outcome.", ["outcome"]
)
TAKEN, LEASE_MS, POLL_S, RETRY_S = 64, 60_000, 0.5, 2.0
# A new job is first checked after FIRST_MS. If the job has not ended, it is checked again after a pause. The
# pause is a tenth of the age of the job, but at least FIRST_MS and at most RAREST_MS.
FIRST_MS, RAREST_MS = 250, 10_000


class AsyncOutputs:
    """The loop that writes answers. Each gateway process has one.

    It writes one answer at a time to save memory.
    """

    def __init__(self, due: AsyncOutputStore, jobs: JobStore, results: JobResults, store: AsyncStore) -> None:
        self._due = due
        self._jobs = jobs
        self._results = results
        self._store = store
        self._loop = RepeatingTask("asynchronous answers", self._step, retry_s=RETRY_S)

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop. Another process writes the remaining answers."""
        await self._loop.stop()
        await self._due.close()

    async def expect(self, job: Job) -> None:
        """Register a job, so that its answer is written when the job has ended.

        Raise Unavailable if the live store (Valkey) is down.
        """
        await self._due.add(job.id, int(time.time() * 1e3) + FIRST_MS)

    async def _step(self) -> float:
        try:
            ids = await self._due.take(TAKEN, LEASE_MS)
            if not ids:
                return POLL_S
            jobs = await self._jobs.get_many(ids)
        except StoreUnavailable:
            return RETRY_S
        done: list[bytes] = []
        again: dict[bytes, int] = {}
        now = int(time.time() * 1e3)
        for id_, job in zip(ids, jobs, strict=True):
            if job is None:
                done.append(id_)  # the job's record was deleted meanwhile
            elif not job.terminal:
                again[id_] = now + min(RAREST_MS, max(FIRST_MS, (now - job.created_ms) // 10))
        ended = [job for job in jobs if job is not None and job.terminal]
        for job in ended:
            if await self._write(job):
                done.append(job.id)
            else:
                again[job.id] = now + RAREST_MS
        try:
            await self._due.settle(done, again)
        except StoreUnavailable:
            return RETRY_S  # not settled: these answers are written again when their leases expire
        return 0.0 if len(ids) == TAKEN else POLL_S

    async def _write(self, job: Job) -> bool:
        """Write a job's answer or error. Return False if a store fails.

        After False, the calling code must write the answer again later.
        """
        name = job.id.hex()
        try:
            key, body, outcome = await self._answer(job, name)
            await self._store.write(key, body)
        except Unavailable as error:
            log.warning(
                "an answer could not be written to the store", extra={"job": name, "problem": error.message}
            )
            return False
        WRITTEN.labels(outcome).inc()
        return True

    async def _answer(self, job: Job, name: str) -> tuple[str, bytes, str]:
        try:
            if job.state != "succeeded":
                raise failure_of(job)
            plan = AnswerPlan.from_ask(job.ask)
            tensors, data, rows = await self._results.tensors(job, await self._results.frame(job))
            _, body = encoded(plan.accept, tensors, data, rows, rows=plan.rows, whole=plan.whole)
            return output_key(name), body, "written"
        except Unavailable:
            raise
        except TidegateError as failure:
            error = failure
        except Exception:  # an answer that cannot be encoded must not be retried forever
            log.exception("an answer cannot be encoded", extra={"job": name})
            error = TidegateError("internal error; see the log of the service")
        document = {"reason": error.reason, "message": for_caller(error), "job": name}
        return failure_key(name), orjson.dumps(document), "failed"
