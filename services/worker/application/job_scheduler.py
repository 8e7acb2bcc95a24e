"""Runs jobs: sets their records to running, calls the model, records results, then acks their messages.

A job is dropped if its record says that this worker no longer has it (it was cancelled, has expired, or
another worker has it). While the store does not answer, jobs wait, and the store is called again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

from services.worker.adapters.metrics import JOBS, SUSPECTS
from services.worker.adapters.model import Model
from services.worker.adapters.request_log import log_failure, log_request
from services.worker.application.job_deliveries import JobDeliveries
from services.worker.application.job_records import AttemptEnd, JobRecords
from services.worker.application.llm_jobs import llm_answer
from services.worker.application.model_calls import (
    CallFailure,
    count_failure,
    count_slot_success,
    count_success,
    decide_failure,
    replies_to,
)
from services.worker.application.sampler import Sampler
from services.worker.application.upstream_patience import UpstreamPatience
from services.worker.domain.concurrency import jobs_ahead
from services.worker.domain.job_backlog import JobBacklog, QueuedJob, call_parameters
from services.worker.domain.statistics import WorkStats
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import ModelFailed, TidegateError, Unavailable
from tidegate.kernel.protocol.jobs import Terminal
from tidegate.kernel.protocol.usage import tokens

log = telemetry.logger(__name__)

# After a failure of the store or the model server, the next try is this many seconds later.
RETRY_S = 0.5
# While a suspect runs, no other call starts for up to this many seconds. A suspect that kills its worker
# usually does so earlier.
HOLD_S = 5.0
# While this many groups of results wait for the store, the scheduler takes no more jobs from its backlog.
MAX_RECORDING = 16


class JobScheduler:
    """Runs the jobs of a worker. ``by_id`` has all of them.

    A job starts only if the model can take another call and no request waits. ``wake`` is called when a call
    may start. If a model server ends during a call, ``on_lost`` is called with its model.

    A job that was lost with its worker or model server is a suspect. It starts in the context that ``alone``
    returns, in which no queued request starts.

    ``slots``: the most requests that a decoupled model runs at the same time; 0 for other models. ``sampler``
    samples the calls; None if they are not sampled. ``upstream_wait_s``: the longest time, in seconds, for
    which a job waits for an upstream that does not answer.
    """

    sampler: Sampler | None = None

    def __init__(
        self, records: JobRecords, *, max_rows: int, slots: int = 0, upstream_wait_s: float = 0.0
    ) -> None:
        self._records = records
        self._max_rows = max_rows
        self._slots = slots
        self._patience = UpstreamPatience(upstream_wait_s)
        self._model: Model | None = None
        self._deliveries: JobDeliveries
        self._backlog = JobBacklog()
        self._taking: set[asyncio.Task[None]] = set()
        self._ready: deque[list[QueuedJob]] = deque()
        self._suspects: deque[QueuedJob] = deque()
        self._suspects_task: asyncio.Task[None] | None = None
        self._calls: dict[asyncio.Task[None], list[QueuedJob]] = {}
        self._recording: set[asyncio.Task[None]] = set()
        self._paused_until = 0.0
        self.by_id: dict[bytes, QueuedJob] = {}
        self.stats = WorkStats()
        self.wake: Callable[[], None] = lambda: None
        self.on_lost: Callable[[Model], None] = lambda _: None
        self.alone: Callable[[], AbstractAsyncContextManager[None]]

    @property
    def open_calls(self) -> int:
        """Return the number of job calls in flight."""
        return len(self._calls)

    @property
    def in_calls(self) -> int:
        """Return how many jobs are in calls."""
        return sum(map(len, self._calls.values()))

    def settle_through(self, deliveries: JobDeliveries) -> None:
        """Use ``deliveries`` from now on to settle the messages of jobs."""
        self._deliveries = deliveries

    def use(self, model: Model | None) -> None:
        """Call ``model`` from now on. If it is None, start no calls."""
        self._model = model
        if model is not None:
            self._paused_until = 0.0
            self._start_suspects()

    def add(self, job: QueuedJob) -> None:
        """Queue a job."""
        self.by_id[job.id] = job
        self._backlog.add(job)
        self.wake()

    def start_calls(self, free_calls: int, limit: int, free_jobs: int) -> None:
        """Start calls of jobs that are ready, and prepare the jobs for the next calls.

        To prepare a job, set its record to ``running`` and fetch its tensors. At most ``free_calls`` calls
        start, with at most ``free_jobs`` jobs. At most ``limit`` calls of jobs are in flight.
        """
        model = self._model
        if model is None:
            return
        while self._ready and free_calls > 0 and free_jobs > 0 and len(self._calls) < limit:
            taken = self._ready.popleft()
            if len(taken) > free_jobs:
                self._ready.appendleft(taken[free_jobs:])
            group = [job for job in taken[:free_jobs] if not job.ended]
            if group:
                free_calls -= 1
                free_jobs -= len(group)
                self._start_call(model, group)
        max_groups = limit + jobs_ahead(limit, self.stats.call_ms.value)
        while len(self._backlog) and len(self._calls) + len(self._ready) + len(self._taking) < max_groups:
            if len(self._recording) >= MAX_RECORDING or time.monotonic() < self._paused_until:
                return
            group = self._backlog.take(self._max_rows)
            self._run_task(self._taking, self._take(group), group)

    def cancel(self, ids: Sequence[bytes]) -> None:
        """End the cancelled jobs that run here. Cancelled jobs that wait are dropped later (see `_take`)."""
        for id_ in ids:
            job = self.by_id.get(id_)
            if job is not None and job.started and job.attempt and not job.ended:
                self._record([AttemptEnd(job, "cancelled")])
                self._abort(job)

    def drop_lost(self, job: QueuedJob) -> None:
        """Drop a job, because its record says that this worker no longer has it."""
        if self.by_id.get(job.id) is job:
            JOBS.labels("lost").inc()
            self._abort(job)
            self._ack_and_forget([job])

    def release_waiting(self, received_before: float) -> list[QueuedJob]:
        """Remove and return the waiting jobs that this worker received at ``received_before`` or earlier.

        ``received_before`` is a time of the monotonic clock. A job whose record may say ``running`` stays
        here. Otherwise the next worker would count the job's present attempt as lost.
        """
        return self._release(lambda job: job.received <= received_before and not job.take_pending)

    def release_suspects(self) -> list[QueuedJob]:
        """Remove and return the waiting suspects whose records do not say ``running``."""
        released = [job for job in self._suspects if not job.attempt and not job.take_pending]
        self._suspects = deque(job for job in self._suspects if job not in released)
        for job in released:
            self._forget(job)
        return released

    def discard_waiting(self) -> None:
        """Discard the waiting jobs, because their channel has ended. The broker delivers them again."""
        self._release(lambda job: True)
        self.release_suspects()

    async def stop(self) -> None:
        """Stop immediately. The broker delivers unacked jobs again, and ``JobLeases`` releases the leases."""
        await tasks.end(self._suspects_task, *self._taking, *self._calls, *self._recording)

    # --- take ------------------------------------------------------------------------------------------

    async def _take(self, group: list[QueuedJob]) -> None:
        """Set the records of jobs to ``running``. Fetch the tensors of those that the store lets run."""
        group = [job for job in group if not job.ended]
        for job in group:
            job.started = job.take_pending = True
        try:
            outcomes = await self._records.take(group)
        except Unavailable as error:
            log.warning("jobs wait for the store", extra={"problem": error.message})
            self._requeue(group)
            return
        running: list[QueuedJob] = []
        for job, taken in zip(group, outcomes, strict=True):
            job.take_pending = False
            if taken.outcome == "run" and not job.ended:
                job.set_attempt(taken.attempt, time.monotonic())
                running.append(job)
            elif taken.outcome == "suspect" and not job.ended:
                self._queue_suspect(job)
            else:
                self._reject(job, taken.outcome)
        ready = [job for job in running if await self._fetch_tensors(job)]
        if ready:
            self._ready.append(ready)
        self.wake()

    def _reject(self, job: QueuedJob, outcome: str) -> None:
        """Settle a job that must not run, or that has ended. ``outcome`` is the answer of the store."""
        JOBS.labels("dropped" if outcome == "drop" else outcome).inc()
        if outcome == "failed":
            job.ended = True
            self._run_task(self._recording, self._dead_letter(job), [job])
        else:
            self._ack_and_forget([job])

    async def _dead_letter(self, job: QueuedJob) -> None:
        await self._deliveries.dead_letter(job)
        self._ack_and_forget([job])

    async def _fetch_tensors(self, job: QueuedJob) -> bool:
        """Fetch a job's tensors. If this fails, record that the job failed, and return False."""
        try:
            job.request = await self._records.with_tensors(job.request)
        except Unavailable as error:
            self._record([AttemptEnd(job, "failed", error=error)])
            return False
        return True

    # --- suspects --------------------------------------------------------------------------------------

    def _queue_suspect(self, job: QueuedJob) -> None:
        job.started = False
        self._suspects.append(job)
        self._start_suspects()

    def _start_suspects(self) -> None:
        if self._suspects and (self._suspects_task is None or self._suspects_task.done()):
            self._suspects_task = asyncio.create_task(self._run_suspects(), name="suspected jobs")
            self._suspects_task.add_done_callback(self._on_suspects_done)

    def _on_suspects_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("suspect jobs did not run; the worker tries again", exc_info=error)
            self._pause()
            asyncio.get_running_loop().call_later(RETRY_S, self._start_suspects)

    async def _run_suspects(self) -> None:
        """Run the suspects one at a time. Pause after each, so that other work can run.

        The pause is as long as the suspect took, but at most ``HOLD_S`` seconds.
        """
        while self._suspects and self._model is not None:
            began, call = time.monotonic(), None
            async with self.alone():
                if self._suspects and self._model is not None:
                    job = self._suspects.popleft()
                    try:
                        call = await self._start_suspect(job)
                    except BaseException:
                        self._suspects.appendleft(job)
                        raise
                if call is not None:
                    await asyncio.wait({call}, timeout=HOLD_S)
            if call is not None:
                await asyncio.wait({call})
            await asyncio.sleep(min(time.monotonic() - began, HOLD_S))

    async def _start_suspect(self, job: QueuedJob) -> asyncio.Task[None] | None:
        """Set a suspect's record to ``running`` and start its call; return None if no call started."""
        if job.ended:
            return None
        job.started = job.take_pending = True
        try:
            (taken,) = await self._records.take([job], alone=True)
        except Unavailable as error:
            log.warning("a suspect job waits for the store", extra={"problem": error.message})
            self._requeue_one(job, self._suspects.append)
            await asyncio.sleep(RETRY_S)
            return None
        job.take_pending = False
        if taken.outcome != "run" or job.ended:
            self._reject(job, taken.outcome)
            return None
        job.set_attempt(taken.attempt, time.monotonic())
        if not await self._fetch_tensors(job) or job.ended:
            return None
        if self._model is None:  # the job waits; the store lets it run later, in the same attempt
            job.started = False
            self._suspects.append(job)
            return None
        SUSPECTS.inc()
        return self._start_call(self._model, [job])

    # --- call ------------------------------------------------------------------------------------------

    def _start_call(self, model: Model, group: list[QueuedJob]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._call(model, group))
        self._calls[task] = group
        task.add_done_callback(self._on_call_done)
        return task

    async def _call(self, model: Model, group: list[QueuedJob]) -> None:
        started, ledger = time.monotonic(), self.stats.time
        timeout_s = max(max(job.request.deadline_ms for job in group) / 1e3 - time.time(), 0.001)
        if model.decoupled:
            await self._call_llm(model, group[0], started, timeout_s)
            return
        mark = ledger.begin()
        try:
            answer = await model.call([job.request for job in group], timeout_s, call_parameters(group))
            spent = time.monotonic() - started
            replies = replies_to(group, answer, started, spent)
        except Exception as error:
            failure = decide_failure(group, error, "the job could not be run")
            ledger.waste(mark, failure.waste, len(group))
            if not await self._wait_for_upstream(model, group, failure):
                await self._on_failure(model, failure)
            return
        except BaseException:
            ledger.waste(mark, "cancelled", len(group))
            raise
        ledger.answered(mark, group)
        count_success(self.stats, group, started, spent)
        if (sampler := self.sampler) is not None and sampler.wants:
            sampler.add(group, answer)
        shared = len(group)
        self._record(
            [
                AttemptEnd(job, "succeeded", reply, None, started - job.received, spent, shared)
                for job, reply in zip(group, replies, strict=True)
            ]
        )

    async def _call_llm(self, model: Model, job: QueuedJob, started: float, timeout_s: float) -> None:
        """Run a job on a language model. If the engine refuses the job, record the refusal."""
        ledger = self.stats.time
        mark = ledger.begin()
        try:
            wait = partial(self._records.wait, [job])
            found = await llm_answer(model, job.request, timeout_s, self._patience.wait_s, wait)
            spent = time.monotonic() - started
            (reply,) = replies_to([job], found.answer, started, spent)
        except Exception as error:
            failure = decide_failure([job], error, "the job could not be run")
            ledger.waste(mark, failure.waste)
            await self._on_failure(model, failure)
            return
        except BaseException:
            ledger.waste(mark, "cancelled")
            raise
        if (refused := found.refusal) is None:
            ledger.answered(mark, [job])
            ledger.add_tokens(job.request.tenant, *tokens(found.answer.parameters))
            count_slot_success(self.stats, self._slots, job, started, spent)
        else:
            ledger.waste(mark, "failed")
            refused = log_failure(job.request, refused, job=job.id.hex(), attempt=job.attempt)
            count_failure(self.stats, job)
        state: Terminal = "succeeded" if refused is None else "failed"
        self._record([AttemptEnd(job, state, reply, refused, started - job.received, spent, self._slots)])

    async def _wait_for_upstream(
        self, model: Model, group: list[QueuedJob], failure: CallFailure[QueuedJob]
    ) -> bool:
        """Wait for a silent upstream, then call it again. If the jobs must fail now, return False instead."""
        pause_s = self._patience.pause_s(group, failure)
        if pause_s is None:
            return False
        await self._records.wait(group, pause_s)
        left = [job for job in group if not job.ended]
        if left and self._model is model:
            self._start_call(model, left)
        elif left:
            self._requeue(left)
        return True

    async def _on_failure(self, model: Model, failure: CallFailure[QueuedJob]) -> None:
        self._record([AttemptEnd(job, "expired") for job in failure.expired])
        if failure.lost:
            self._requeue_lost(failure.lost, failure.error)
            self.on_lost(model)
        for job in failure.failed:
            shown = log_failure(job.request, failure.error, job=job.id.hex(), attempt=job.attempt)
            count_failure(self.stats, job)
            self._record([AttemptEnd(job, "failed", error=shown)])
        for job in failure.retried:
            if job.ended:
                continue
            if self._model is not model:  # the server ended in an earlier retry of this group
                self._requeue([job])
            elif job.request.deadline_ms <= time.time() * 1e3:
                self._record([AttemptEnd(job, "expired")])
            else:
                await self._call(model, [job])

    def _requeue_lost(self, group: Sequence[QueuedJob], error: TidegateError) -> None:
        """Queue the jobs of a lost call again in this worker. They run when a model server is ready."""
        log.warning("a call with jobs was lost", extra={"jobs": len(group), "problem": error.message})
        for job in group:
            log_request(logging.WARNING, "the call of a job was lost", job.request, job=job.id.hex())
            if not job.ended:
                job.lost_attempt, job.started = job.attempt, False
                self._backlog.add(job)
        self._pause()

    def _on_call_done(self, task: asyncio.Task[None]) -> None:
        group = self._calls.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a model call with jobs ended unexpectedly", exc_info=error)
            self._requeue_lost(group, ModelFailed(repr(error)))
        self.wake()

    def _abort(self, job: QueuedJob) -> None:
        """End a job's attempt, and cancel its call if all jobs of the call have ended."""
        job.ended = True
        for task, group in self._calls.items():
            if job in group and all(other.ended for other in group):
                task.cancel()

    # --- record and settle -----------------------------------------------------------------------------

    def _record(self, ends: list[AttemptEnd]) -> None:
        """Record in the background how attempts ended."""
        fresh = [end for end in ends if not end.job.ended]
        for end in fresh:
            end.job.ended = True
        if fresh:
            self._run_task(self._recording, self._settle(fresh), [end.job for end in fresh])

    async def _settle(self, ends: list[AttemptEnd]) -> None:
        for end, ours in zip(ends, await self._records.record(ends), strict=True):
            JOBS.labels(end.state if ours else "lost").inc()
        self._ack_and_forget([end.job for end in ends])

    def _ack_and_forget(self, group: list[QueuedJob]) -> None:
        for job in group:
            job.ended = True
            self._forget(job)
        self._deliveries.ack(group)
        self.wake()

    def _requeue(self, group: Sequence[QueuedJob]) -> None:
        """Queue jobs again in this worker, and pause before the next call."""
        for job in group:
            self._requeue_one(job, self._backlog.add)
        self._pause()

    def _requeue_one(self, job: QueuedJob, queue: Callable[[QueuedJob], None]) -> None:
        job.started = False
        if job.attempt or self._deliveries.can_ack(job):
            queue(job)
        else:
            self._forget(job)  # its message's channel has closed, so the broker delivers the message again

    def _pause(self) -> None:
        self._paused_until = time.monotonic() + RETRY_S
        asyncio.get_running_loop().call_later(RETRY_S, self.wake)

    def _release(self, chosen: Callable[[QueuedJob], bool]) -> list[QueuedJob]:
        released = self._backlog.remove(lambda job: not job.attempt and chosen(job))
        for job in released:
            self._forget(job)
        return released

    def _forget(self, job: QueuedJob) -> None:
        if self.by_id.get(job.id) is job:
            del self.by_id[job.id]

    def _abandon(self, group: list[QueuedJob]) -> None:
        """Nack the messages of unfinished jobs after an internal error, so that any worker can run them.

        A leased job has no message, but the router publishes it again when its lease expires.
        """
        unfinished = [job for job in group if self.by_id.get(job.id) is job]
        for job in unfinished:
            job.ended = True
            self._forget(job)
        self._deliveries.nack(unfinished)
        self._pause()  # an immediate try would probably fail too

    def _run_task(
        self, tasks_: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], group: list[QueuedJob]
    ) -> None:
        """Run ``work`` as a task of the set ``tasks_``. If it fails, requeue the unfinished jobs."""

        def on_done(task: asyncio.Task[None]) -> None:
            tasks_.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("jobs could not be handled; they are requeued", exc_info=error)
                self._abandon(group)
            self.wake()

        task = asyncio.create_task(work)
        tasks_.add(task)
        task.add_done_callback(on_done)
