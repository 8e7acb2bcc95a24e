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
from services.worker.application.calls import answers, as_told, divided, measure
from services.worker.application.job_results import End, JobResults
from services.worker.domain.job_backlog import Held, JobBacklog
from services.worker.domain.pace import jobs_ahead
from services.worker.domain.split import Mismatch
from services.worker.domain.stats import Stats
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

    def settle(self, group: Sequence[Held]) -> None:
        """These are over: ack their messages."""

    def give_back(self, group: Sequence[Held]) -> None:
        """Nothing is known of these here any more: have their messages delivered again."""

    def is_open(self, held: Held) -> bool:
        """Whether its message is still ours to ack."""

    async def bury(self, held: Held) -> None:
        """Hand a job to the router that may not be tried again; returns when the broker has it."""


class Jobs:
    """Runs jobs. ``wake`` is called when there may be something to begin, ``lost`` with a model whose server
    is gone; within ``alone`` nothing else is in the model; ``held`` are all in hand, by id.

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
        self._ready: deque[list[Held]] = deque()
        self._suspects: deque[Held] = deque()
        self._isolating: asyncio.Task[None] | None = None
        self._calls: dict[asyncio.Task[None], list[Held]] = {}
        self._recording: set[asyncio.Task[None]] = set()
        self._rests_until = 0.0
        self.held: dict[bytes, Held] = {}
        self.stats = Stats()
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

    def add(self, held: Held) -> None:
        """Take a job in."""
        self.held[held.id] = held
        self._backlog.add(held)
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
            group = [held for held in together[:free] if not held.over]
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
            held = self.held.get(id_)
            if held is not None and held.begun and held.attempt and not held.over:
                self._record([End(held, "cancelled")])
                self._let_go(held)

    def lose(self, held: Held) -> None:
        """The record says that a job is not ours any more."""
        if self.held.get(held.id) is held:
            JOBS.labels("lost").inc()
            self._let_go(held)
            self._done([held])

    def give_back(self, before: float) -> list[Held]:
        """Let go of what waits since before a time of the worker's monotonic clock; gives it.

        Not of what may have begun by its record: to whoever had it next, a worker would have been lost.
        """
        return self._leave(lambda held: held.received <= before and not held.asked)

    def give_back_suspects(self) -> list[Held]:
        """Let go of the suspects that wait for their message only; gives them."""
        left = [held for held in self._suspects if not held.attempt and not held.asked]
        self._suspects = deque(held for held in self._suspects if held not in left)
        for held in left:
            self._drop(held)
        return left

    def forget(self) -> None:
        """Forget what waits: its channel has ended and the broker delivers it again."""
        self._leave(lambda held: True)
        self.give_back_suspects()

    async def stop(self) -> None:
        """Stop at once; what is in hand comes to others, by its message or when its lease is given up."""
        await tasks.end(self._isolating, *self._taking, *self._calls, *self._recording)

    # --- take, call, record ----------------------------------------------------------------------------

    async def _take(self, group: list[Held]) -> None:
        group = [held for held in group if not held.over]
        for held in group:
            held.begun = held.asked = True
        try:
            found = await self._store.take([self._claim(held) for held in group])
        except Unavailable as error:
            log.warning("jobs wait for the store", extra={"problem": error.message})
            self._put_back(group)
            return
        live: list[Held] = []
        for held, taken in zip(group, found, strict=True):
            held.asked = False
            if taken.outcome == "run" and not held.over:
                held.taken(taken.attempt, time.monotonic())
                live.append(held)
            elif taken.outcome == "suspect" and not held.over:
                self._suspect(held)
            else:
                self._dropped(held, taken.outcome)
        live = [held for held in live if await self._fetched(held)]
        if live:
            self._ready.append(live)
        self.wake()

    def _dropped(self, held: Held, outcome: str) -> None:
        JOBS.labels("dropped" if outcome == "drop" else outcome).inc()
        if outcome == "failed":
            held.over = True
            self._track(self._recording, self._buried(held), [held])
        else:
            self._done([held])

    async def _buried(self, held: Held) -> None:
        assert self._door is not None
        await self._door.bury(held)
        self._done([held])

    def _suspect(self, held: Held) -> None:
        """Let a job run alone that was lost before."""
        held.begun = False
        self._suspects.append(held)
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
                    held = self._suspects.popleft()
                    try:
                        call = await self._begin_suspect(held)
                    except BaseException:
                        self._suspects.appendleft(held)
                        raise
                if call is not None:
                    await asyncio.wait({call}, timeout=HOLD_S)
            if call is not None:
                await asyncio.wait({call})
            await asyncio.sleep(min(time.monotonic() - began, HOLD_S))

    async def _begin_suspect(self, held: Held) -> asyncio.Task[None] | None:
        """Take a suspect in its record and begin its call; None: there is none to begin."""
        if held.over:
            return None
        held.begun = held.asked = True
        try:
            (taken,) = await self._store.take([self._claim(held, alone=True)])
        except Unavailable as error:
            log.warning("a suspected job waits for the store", extra={"problem": error.message})
            held.begun = False
            assert self._door is not None
            if held.attempt or self._door.is_open(held):
                self._suspects.append(held)
            else:
                self._drop(held)  # its channel ended meanwhile: it comes again
            await asyncio.sleep(REST_S)
            return None
        held.asked = False
        if taken.outcome != "run" or held.over:
            self._dropped(held, taken.outcome)
            return None
        held.taken(taken.attempt, time.monotonic())
        if not await self._fetched(held) or held.over:
            return None
        if self._model is None:  # taken again, it is the same attempt
            held.begun = False
            self._suspects.append(held)
            return None
        SUSPECTS.inc()
        return self._begin_call(self._model, [held])

    def _begin_call(self, model: Model, group: list[Held]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._call(model, group))
        self._calls[task] = group
        task.add_done_callback(self._called)
        return task

    def _claim(self, held: Held, *, alone: bool = False) -> Take:
        return Take(
            held.id,
            self._replica,
            held.redelivered,
            held.request.attempt,
            token=held.token,
            lost=held.lost,
            alone=alone,
        )

    async def _fetched(self, held: Held) -> bool:
        """Whether its tensors are here; if they cannot be had the job has failed."""
        try:
            held.request = await self._results.fetched(held.request)
        except Unavailable as error:
            self._record([End(held, "failed", error=error)])
            return False
        return True

    def _put_back(self, group: list[Held]) -> None:
        assert self._door is not None
        for held in group:
            held.begun = False
            if held.attempt or self._door.is_open(held):
                self._backlog.add(held)
            else:
                self._drop(held)  # its channel ended meanwhile: it comes again
        self._rest()

    def _rest(self) -> None:
        self._rests_until = time.monotonic() + REST_S
        asyncio.get_running_loop().call_later(REST_S, self.wake)

    async def _call(self, model: Model, group: list[Held]) -> None:
        started = time.monotonic()
        timeout_s = max(max(held.request.deadline_ms for held in group) / 1e3 - time.time(), 0.001)
        try:
            answer = await model.call([held.request for held in group], timeout_s, _told(group))
            spent = time.monotonic() - started
            replies = answers(group, answer, started, spent)
        except (BadRequest, ModelFailed, PayloadTooLarge, Mismatch, Undecodable) as error:
            await self._on_model_error(model, group, error)
        except DeadlinePassed:
            self._record([End(held, "expired") for held in group])
        except Unavailable as error:
            self._on_lost(group, error)
            self.lost(model)
        except Exception as error:
            log.exception("a job's call failed unexpectedly")
            await self._on_model_error(model, group, ModelFailed(f"the job could not be run: {error!r}"))
        else:
            measure(self.stats, group, started, spent)
            waits = [started - held.received for held in group]
            ends = zip(group, replies, waits, strict=True)
            shared = len(group)
            self._record([End(h, "succeeded", reply, None, wait, spent, shared) for h, reply, wait in ends])

    async def _on_model_error(self, model: Model, group: list[Held], error: Exception) -> None:
        """A bad job must not fail its neighbours."""
        over, again = divided(group)
        told = as_told(error, len(group))
        for held in over:
            shown = failed(held.request, told, job=held.id.hex(), attempt=held.attempt)
            self.stats.failed += 1
            self.stats.tally.failed(1, time.monotonic() - held.received)
            self._record([End(held, "failed", error=shown)])
        for held in again:
            if held.over:
                continue
            if self._model is not model:  # one of them before it took the server along
                self._put_back([held])
            elif held.request.deadline_ms <= time.time() * 1e3:
                self._record([End(held, "expired")])
            else:
                await self._call(model, [held])

    def _on_lost(self, group: list[Held], error: TidegateError) -> None:
        """The model server died under them: another attempt, here, when it is back."""
        log.warning("jobs lost their model server", extra={"jobs": len(group), "problem": error.message})
        for held in group:
            note(logging.WARNING, "job lost its model server", held.request, job=held.id.hex())
            if not held.over:
                held.lost, held.begun = held.attempt, False
                self._backlog.add(held)
        self._rest()

    def _called(self, task: asyncio.Task[None]) -> None:
        group = self._calls.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a job's call ended unexpectedly", exc_info=error)
            self._on_lost(group, ModelFailed(repr(error)))
        self.wake()

    def _record(self, ends: list[End]) -> None:
        """Write down how attempts ended, beside the next calls."""
        fresh = [end for end in ends if not end.held.over]
        for end in fresh:
            end.held.over = True
        if fresh:
            self._track(self._recording, self._recorded(fresh), [end.held for end in fresh])

    async def _recorded(self, ends: list[End]) -> None:
        for end, ours in zip(ends, await self._results.record(ends), strict=True):
            JOBS.labels(end.state if ours else "lost").inc()
        self._done([end.held for end in ends])

    # --- what is in hand -------------------------------------------------------------------------------

    def _let_go(self, held: Held) -> None:
        """Nothing is computed for it any more; a call ends when that is so for all of its jobs."""
        held.over = True
        for task, group in self._calls.items():
            if held in group and all(one.over for one in group):
                task.cancel()

    def _done(self, group: list[Held]) -> None:
        assert self._door is not None
        for held in group:
            held.over = True
            self._drop(held)
        self._door.settle(group)
        self.wake()

    def _leave(self, which: Callable[[Held], bool]) -> list[Held]:
        found = self._backlog.remove(lambda held: not held.attempt and which(held))
        for held in found:
            self._drop(held)
        return found

    def _drop(self, held: Held) -> None:
        if self.held.get(held.id) is held:
            del self.held[held.id]

    def _abandon(self, group: list[Held]) -> None:
        """Let go of what is not done yet: it comes again, by its message or when its lease lapses."""
        assert self._door is not None
        left = [held for held in group if self.held.get(held.id) is held]
        for held in left:
            held.over = True
            self._drop(held)
        self._door.give_back(left)
        self._rest()  # what has failed here once may well fail again

    def _track(
        self, where: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], group: list[Held]
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


def _told(group: list[Held]) -> dict[str, str]:
    """What the model may know of its jobs, in the order of their rows."""
    return {"tidegate_jobs": ",".join(f"{h.id.hex()}:{h.attempt}:{h.request.rows}" for h in group)}
