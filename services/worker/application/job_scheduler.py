"""A worker's jobs: taken in the record, run, their results recorded; only then are their messages acked.

They run in the calls that requests leave free. Whatever happens here, the record decides: a job that is not
ours any more (cancelled, expired, taken over) is let go, and a store that is away is asked again for ever.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from services.worker.adapters.metrics import JOBS, SUSPECTS
from services.worker.adapters.model import Model
from services.worker.adapters.request_log import failed, note
from services.worker.application.job_results import AttemptEnd, JobResults
from services.worker.application.model_calls import answers, as_told, divided, measure
from services.worker.domain.concurrency import jobs_ahead
from services.worker.domain.job_backlog import JobBacklog, QueuedJob
from services.worker.domain.split import RowMismatch
from services.worker.domain.statistics import WorkStats
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import (
    BadRequest,
    DeadlinePassed,
    ModelFailed,
    PayloadTooLarge,
    TidegateError,
    Unavailable,
)
from tidegate.kernel.protocol.envelope import Undecodable
from tidegate.kernel.protocol.jobs import Take
from tidegate.kernel.store import JobStore

log = telemetry.logger(__name__)

# After the store or the model server failed, before the next try.
REST_S = 0.5
# How long nothing else is begun beside a job that is a suspect. What kills, kills soon.
HOLD_S = 5.0
# Groups whose results are on their way to the store; with more, no new ones are taken.
MOST_RECORDING = 16


class Door(Protocol):
    """Where the messages of jobs come from."""

    def settle(self, group: Sequence[QueuedJob]) -> None:
        """These are over: ack their messages."""

    def give_back(self, group: Sequence[QueuedJob]) -> None:
        """Nothing is known of these here any more: have their messages delivered again."""

    def is_open(self, job: QueuedJob) -> bool:
        """Whether its message is still ours to ack."""

    async def bury(self, job: QueuedJob) -> None:
        """Hand a job to the router that may not be tried again; returns when the broker has it."""


class JobScheduler:
    """Runs jobs. ``wake`` is called when there may be something to begin, ``lost`` with a model whose server
    is gone; within ``alone`` nothing else is in the model; ``by_id`` holds all jobs in hand.

    A job that was lost with its worker or model server is a suspect: it runs with nothing beside it.
    """

    def __init__(self, store: JobStore, results: JobResults, replica: str, *, max_rows: int) -> None:
        self._store = store
        self._results = results
        self._replica = replica
        self._max_rows = max_rows
        self._model: Model | None = None
        self._door: Door | None = None
        self._backlog = JobBacklog()
        self._taking: set[asyncio.Task[None]] = set()
        self._ready: deque[list[QueuedJob]] = deque()
        self._suspects: deque[QueuedJob] = deque()
        self._isolating: asyncio.Task[None] | None = None
        self._calls: dict[asyncio.Task[None], list[QueuedJob]] = {}
        self._recording: set[asyncio.Task[None]] = set()
        self._rests_until = 0.0
        self.by_id: dict[bytes, QueuedJob] = {}
        self.stats = WorkStats()
        self.wake: Callable[[], None] = lambda: None
        self.lost: Callable[[Model], None] = lambda _: None
        self.alone: Callable[[], AbstractAsyncContextManager[None]]

    @property
    def calling(self) -> int:
        """Calls that are open."""
        return len(self._calls)

    def come_from(self, door: Door) -> None:
        """Where the messages come from."""
        self._door = door

    def use(self, model: Model | None) -> None:
        """The model to call from now on, or None while there is none."""
        self._model = model
        if model is not None:
            self._rests_until = 0.0
            self._isolate()

    def add(self, job: QueuedJob) -> None:
        """Take a job in."""
        self.by_id[job.id] = job
        self._backlog.add(job)
        self.wake()

    @property
    def in_calls(self) -> int:
        """Jobs that are in calls."""
        return sum(map(len, self._calls.values()))

    def begin(self, room: int, limit: int, free: int) -> None:
        """Open calls and prepare the next ones.

        ``room`` more calls at most, with ``free`` jobs in all, so that no more than ``limit`` are of jobs.
        """
        model = self._model
        if model is None:
            return
        while self._ready and room > 0 and free > 0 and len(self._calls) < limit:
            together = self._ready.popleft()
            if len(together) > free:
                self._ready.appendleft(together[free:])
            group = [job for job in together[:free] if not job.over]
            if group:
                room -= 1
                free -= len(group)
                self._begin_call(model, group)
        most = limit + jobs_ahead(limit, self.stats.call_ms.value)
        while len(self._backlog) and len(self._calls) + len(self._ready) + len(self._taking) < most:
            if len(self._recording) >= MOST_RECORDING or time.monotonic() < self._rests_until:
                return
            group = self._backlog.take(self._max_rows)
            self._track(self._taking, self._take(group), group)

    def cancel(self, ids: Sequence[bytes]) -> None:
        """Nobody wants these: what runs is ended in the model server; what waits is found over when taken."""
        for id_ in ids:
            job = self.by_id.get(id_)
            if job is not None and job.begun and job.attempt and not job.over:
                self._record([AttemptEnd(job, "cancelled")])
                self._let_go(job)

    def lose(self, job: QueuedJob) -> None:
        """The record says that a job is not ours any more."""
        if self.by_id.get(job.id) is job:
            JOBS.labels("lost").inc()
            self._let_go(job)
            self._done([job])

    def give_back(self, before: float) -> list[QueuedJob]:
        """Let go of what waits since before a time of the worker's monotonic clock; gives it.

        Not of what may have begun by its record: to whoever had it next, a worker would have been lost.
        """
        return self._leave(lambda job: job.received <= before and not job.asked)

    def give_back_suspects(self) -> list[QueuedJob]:
        """Let go of the suspects that wait for their message only; gives them."""
        left = [job for job in self._suspects if not job.attempt and not job.asked]
        self._suspects = deque(job for job in self._suspects if job not in left)
        for job in left:
            self._drop(job)
        return left

    def forget(self) -> None:
        """Forget what waits: its channel has ended and the broker delivers it again."""
        self._leave(lambda job: True)
        self.give_back_suspects()

    async def stop(self) -> None:
        """Stop at once; what is in hand comes to others, by its message or when its lease is given up."""
        await tasks.end(self._isolating, *self._taking, *self._calls, *self._recording)

    # --- take, call, record ----------------------------------------------------------------------------

    async def _take(self, group: list[QueuedJob]) -> None:
        group = [job for job in group if not job.over]
        for job in group:
            job.begun = job.asked = True
        try:
            found = await self._store.take([self._claim(job) for job in group])
        except Unavailable as error:
            log.warning("jobs wait for the store", extra={"problem": error.message})
            self._put_back(group)
            return
        live: list[QueuedJob] = []
        for job, taken in zip(group, found, strict=True):
            job.asked = False
            if taken.outcome == "run" and not job.over:
                job.taken(taken.attempt, time.monotonic())
                live.append(job)
            elif taken.outcome == "suspect" and not job.over:
                self._suspect(job)
            else:
                self._dropped(job, taken.outcome)
        live = [job for job in live if await self._fetched(job)]
        if live:
            self._ready.append(live)
        self.wake()

    def _dropped(self, job: QueuedJob, outcome: str) -> None:
        JOBS.labels("dropped" if outcome == "drop" else outcome).inc()
        if outcome == "failed":
            job.over = True
            self._track(self._recording, self._buried(job), [job])
        else:
            self._done([job])

    async def _buried(self, job: QueuedJob) -> None:
        assert self._door is not None
        await self._door.bury(job)
        self._done([job])

    def _suspect(self, job: QueuedJob) -> None:
        """Let a job run alone that was lost before."""
        job.begun = False
        self._suspects.append(job)
        self._isolate()

    def _isolate(self) -> None:
        if self._suspects and (self._isolating is None or self._isolating.done()):
            self._isolating = asyncio.create_task(self._run_suspects(), name="suspected jobs")
            self._isolating.add_done_callback(self._isolated)

    def _isolated(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("suspected jobs were not run; they are tried again", exc_info=error)
            self._rest()
            asyncio.get_running_loop().call_later(REST_S, self._isolate)

    async def _run_suspects(self) -> None:
        """Run the suspects one at a time, each by turns with everything else; returns without a model."""
        while self._suspects and self._model is not None:
            began, call = time.monotonic(), None
            async with self.alone():
                if self._suspects and self._model is not None:
                    job = self._suspects.popleft()
                    try:
                        call = await self._begin_suspect(job)
                    except BaseException:
                        self._suspects.appendleft(job)
                        raise
                if call is not None:
                    await asyncio.wait({call}, timeout=HOLD_S)
            if call is not None:
                await asyncio.wait({call})
            await asyncio.sleep(min(time.monotonic() - began, HOLD_S))

    async def _begin_suspect(self, job: QueuedJob) -> asyncio.Task[None] | None:
        """Take a suspect in its record and begin its call; None: there is none to begin."""
        if job.over:
            return None
        job.begun = job.asked = True
        try:
            (taken,) = await self._store.take([self._claim(job, alone=True)])
        except Unavailable as error:
            log.warning("a suspected job waits for the store", extra={"problem": error.message})
            job.begun = False
            assert self._door is not None
            if job.attempt or self._door.is_open(job):
                self._suspects.append(job)
            else:
                self._drop(job)  # its channel ended meanwhile: it comes again
            await asyncio.sleep(REST_S)
            return None
        job.asked = False
        if taken.outcome != "run" or job.over:
            self._dropped(job, taken.outcome)
            return None
        job.taken(taken.attempt, time.monotonic())
        if not await self._fetched(job) or job.over:
            return None
        if self._model is None:  # taken again, it is the same attempt
            job.begun = False
            self._suspects.append(job)
            return None
        SUSPECTS.inc()
        return self._begin_call(self._model, [job])

    def _begin_call(self, model: Model, group: list[QueuedJob]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._call(model, group))
        self._calls[task] = group
        task.add_done_callback(self._called)
        return task

    def _claim(self, job: QueuedJob, *, alone: bool = False) -> Take:
        return Take(
            job.id,
            self._replica,
            job.redelivered,
            job.request.attempt,
            token=job.token,
            lost=job.lost,
            alone=alone,
        )

    async def _fetched(self, job: QueuedJob) -> bool:
        """Whether its tensors are here; if they cannot be had the job has failed."""
        try:
            job.request = await self._results.fetched(job.request)
        except Unavailable as error:
            self._record([AttemptEnd(job, "failed", error=error)])
            return False
        return True

    def _put_back(self, group: list[QueuedJob]) -> None:
        assert self._door is not None
        for job in group:
            job.begun = False
            if job.attempt or self._door.is_open(job):
                self._backlog.add(job)
            else:
                self._drop(job)  # its channel ended meanwhile: it comes again
        self._rest()

    def _rest(self) -> None:
        self._rests_until = time.monotonic() + REST_S
        asyncio.get_running_loop().call_later(REST_S, self.wake)

    async def _call(self, model: Model, group: list[QueuedJob]) -> None:
        started = time.monotonic()
        timeout_s = max(max(job.request.deadline_ms for job in group) / 1e3 - time.time(), 0.001)
        try:
            answer = await model.call([job.request for job in group], timeout_s, _told(group))
            spent = time.monotonic() - started
            replies = answers(group, answer, started, spent)
        except (BadRequest, ModelFailed, PayloadTooLarge, RowMismatch, Undecodable) as error:
            await self._on_model_error(model, group, error)
        except DeadlinePassed:
            self._record([AttemptEnd(job, "expired") for job in group])
        except Unavailable as error:
            self._on_lost(group, error)
            self.lost(model)
        except Exception as error:
            log.exception("a job's call failed unexpectedly")
            await self._on_model_error(model, group, ModelFailed(f"the job could not be run: {error!r}"))
        else:
            measure(self.stats, group, started, spent)
            waits = [started - job.received for job in group]
            ends = zip(group, replies, waits, strict=True)
            shared = len(group)
            self._record(
                [AttemptEnd(h, "succeeded", reply, None, wait, spent, shared) for h, reply, wait in ends]
            )

    async def _on_model_error(self, model: Model, group: list[QueuedJob], error: Exception) -> None:
        """A bad job must not fail its neighbours."""
        over, again = divided(group)
        told = as_told(error, len(group))
        for job in over:
            shown = failed(job.request, told, job=job.id.hex(), attempt=job.attempt)
            self.stats.failed += 1
            self.stats.tally.failed(1, time.monotonic() - job.received)
            self._record([AttemptEnd(job, "failed", error=shown)])
        for job in again:
            if job.over:
                continue
            if self._model is not model:  # one of them before it took the server along
                self._put_back([job])
            elif job.request.deadline_ms <= time.time() * 1e3:
                self._record([AttemptEnd(job, "expired")])
            else:
                await self._call(model, [job])

    def _on_lost(self, group: list[QueuedJob], error: TidegateError) -> None:
        """The model server died under them: another attempt, here, when it is back."""
        log.warning("jobs lost their model server", extra={"jobs": len(group), "problem": error.message})
        for job in group:
            note(logging.WARNING, "job lost its model server", job.request, job=job.id.hex())
            if not job.over:
                job.lost, job.begun = job.attempt, False
                self._backlog.add(job)
        self._rest()

    def _called(self, task: asyncio.Task[None]) -> None:
        group = self._calls.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a job's call ended unexpectedly", exc_info=error)
            self._on_lost(group, ModelFailed(repr(error)))
        self.wake()

    def _record(self, ends: list[AttemptEnd]) -> None:
        """Write down how attempts ended, beside the next calls."""
        fresh = [end for end in ends if not end.job.over]
        for end in fresh:
            end.job.over = True
        if fresh:
            self._track(self._recording, self._recorded(fresh), [end.job for end in fresh])

    async def _recorded(self, ends: list[AttemptEnd]) -> None:
        for end, ours in zip(ends, await self._results.record(ends), strict=True):
            JOBS.labels(end.state if ours else "lost").inc()
        self._done([end.job for end in ends])

    # --- what is in hand -------------------------------------------------------------------------------

    def _let_go(self, job: QueuedJob) -> None:
        """Nothing is computed for it any more; a call ends when that is so for all of its jobs."""
        job.over = True
        for task, group in self._calls.items():
            if job in group and all(one.over for one in group):
                task.cancel()

    def _done(self, group: list[QueuedJob]) -> None:
        assert self._door is not None
        for job in group:
            job.over = True
            self._drop(job)
        self._door.settle(group)
        self.wake()

    def _leave(self, which: Callable[[QueuedJob], bool]) -> list[QueuedJob]:
        found = self._backlog.remove(lambda job: not job.attempt and which(job))
        for job in found:
            self._drop(job)
        return found

    def _drop(self, job: QueuedJob) -> None:
        if self.by_id.get(job.id) is job:
            del self.by_id[job.id]

    def _abandon(self, group: list[QueuedJob]) -> None:
        """Let go of what is not done yet: it comes again, by its message or when its lease lapses."""
        assert self._door is not None
        left = [job for job in group if self.by_id.get(job.id) is job]
        for job in left:
            job.over = True
            self._drop(job)
        self._door.give_back(left)
        self._rest()  # what has failed here once may well fail again

    def _track(
        self, where: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], group: list[QueuedJob]
    ) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            where.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("jobs were not handled; they are given back", exc_info=error)
                self._abandon(group)
            self.wake()

        task = asyncio.create_task(work)
        where.add(task)
        task.add_done_callback(ended)


def _told(group: list[QueuedJob]) -> dict[str, str]:
    """What the model may know of its jobs, in the order of their rows."""
    return {"tidegate_jobs": ",".join(f"{h.id.hex()}:{h.attempt}:{h.request.rows}" for h in group)}
