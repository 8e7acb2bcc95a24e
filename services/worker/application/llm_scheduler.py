"""Runs requests to a language model, at most one in each engine slot. So the engine never queues.

Requests without an engine slot stay in the broker. A job starts only if no request waits. If the engine is
lost, this worker does not run the lost requests again. The gateway decides whether to retry them, because
only the gateway knows which part of an answer has reached the caller.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from services.worker.adapters.chunk_sender import ChunkSender
from services.worker.adapters.metrics import ANSWERED, LLM_LOST, LLM_SLOTS
from services.worker.adapters.model import Model
from services.worker.adapters.model_call import ModelAnswer
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.adapters.request_log import log_failure
from services.worker.application.job_scheduler import JobScheduler
from services.worker.application.model_calls import (
    CallFailure,
    count_failure,
    count_slot_success,
    count_stream_time,
)
from services.worker.application.sampler import Sampler
from services.worker.application.stream_answers import send_answers
from services.worker.domain.backlog import QueuedRequest
from services.worker.domain.llm_answers import TokenUsage
from services.worker.domain.llm_bands import LlmRoom, job_slots
from services.worker.domain.statistics import WorkStats
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import BadRequest, TidegateError, WorkerLost
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.llm import KV_TOKENS, REPLICA

log = telemetry.logger(__name__)

# The worker remembers the id of a cancelled request for this many seconds. When the cancel message arrives,
# the request may still wait in the broker. If the request arrives later, the worker must not run it.
CANCELLED_KEPT_S = 600.0
SLOT_POLL_S = 0.01


class LlmScheduler:
    """Runs requests and jobs in the slots of an engine. A job starts only if no request waits.

    ``room`` counts the engine's slots and the tokens in its KV cache. ``replica`` is this worker's name; the
    first chunk of each answer contains it. If a model server ends during a call, ``on_lost`` is called with
    its model.

    ``on_change`` is called when :attr:`free` may have changed. ``fetching`` returns the number of requests
    whose tensors are still being fetched. Each of them will need a slot after that. ``requests_wait``: True
    if requests may wait in the broker. Then :meth:`start_jobs` starts no job.
    """

    def __init__(
        self,
        publisher: ReplyPublisher,
        settle: Callable[[list[QueuedRequest]], None],
        room: LlmRoom,
        replica: str,
        *,
        on_lost: Callable[[Model], None],
        jobs: JobScheduler | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self._sampler = sampler
        self._replies = ChunkSender(publisher)
        self._settle = settle
        self._room = room
        self._facts = {REPLICA: replica}
        self._on_lost = on_lost
        self._jobs = jobs
        self._model: Model | None = None
        self._running = False
        self._due = False
        self._waiting: deque[QueuedRequest] = deque()
        self._calls: dict[asyncio.Task[None], QueuedRequest] = {}
        self._cancelled_calls: set[asyncio.Task[None]] = set()
        self._cancelled: dict[bytes, float] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.fetching: Callable[[], int] = lambda: 0
        self.requests_wait = True
        self.stats = jobs.stats if jobs is not None else WorkStats()
        if jobs is not None:
            jobs.wake, jobs.on_lost, jobs.alone = self._wake, self._on_model_lost, self._job_slot
        LLM_SLOTS.set(room.slots)

    # Always False, because a suspect never runs alone in a language model. So the loss of a model server is
    # never blamed on a suspect.
    suspect_died = False
    # A language model has no stateful sequences.
    kept_sequences = sequence_slots = 0
    # A call has one request, so it does not wait for others.
    max_batch = awaited_batch = 0

    @property
    def serving(self) -> bool:
        """Return True if this worker runs requests now and has a model."""
        return self._running and self._model is not None

    @property
    def free(self) -> int:
        """Return how many more requests may be taken from the broker now."""
        if not self.serving or self._waiting:
            return 0
        return max(0, self._room.slots - self._room.used - self._job_calls - self.fetching())

    @property
    def in_hand(self) -> int:
        """Return how many requests and jobs wait here or run."""
        jobs = len(self._jobs.by_id) if self._jobs else 0
        return len(self._waiting) + len(self._calls) + jobs

    @property
    def copies(self) -> int:
        """Return 0: requests to a language model are never copied for shadow traffic."""
        return 0

    @property
    def max_calls(self) -> int:
        """Return the maximum number of calls in flight."""
        return self._room.slots

    @property
    def effective_concurrency(self) -> float:
        """Return how many requests this replica completes in the time of one call, under full load."""
        return float(self._room.slots)

    @property
    def _job_calls(self) -> int:
        return self._jobs.open_calls if self._jobs else 0

    def start(self) -> None:
        """Start to run requests."""
        self._running = True
        self._wake()

    async def stop(self) -> None:
        """Stop immediately; the requests here stay unsettled and go back to their queues."""
        self._running = False
        await tasks.end(*self._calls)
        await self._replies.stop()
        if self._jobs is not None:
            await self._jobs.stop()

    def use(self, model: Model | None) -> None:
        """Call ``model`` from now on. If it is None, start no calls."""
        self._model = model
        if self._jobs is not None:
            self._jobs.use(model)
        self._wake()

    def lose_model(self) -> None:
        """Start no more calls, because the model server has ended."""
        if self._model is not None:
            self.use(None)

    def caller_timeouts_s(self) -> list[float]:
        """Return infinity for each open call, because streams and jobs have no timeout."""
        return [math.inf] * (len(self._calls) + self._job_calls)

    def running(self, id_: bytes) -> QueuedRequest | None:
        """Return the request with this id; None if no such request waits or runs here."""
        here = (*self._waiting, *self._calls.values())
        return next((item for item in here if item.request.id == id_), None)

    def add(self, item: QueuedRequest) -> None:
        """Queue a request. It runs as soon as a slot is free and its tokens fit into the KV cache.

        If the request is not a stream, answer it with an error.
        """
        self._replies.heard_from(item.delivery.reply_to)
        if not item.request.flags & envelope.STREAM:
            self._start(item, self._refuse(item))
            return
        self._waiting.append(item)
        self._start_waiting()

    def cancel(self, ids: list[bytes]) -> None:
        """Cancel the requests with these ids.

        A request that waits does not start. If a request runs, its call is cancelled, so that its slot
        becomes free. If an id is the id of a job, the job is cancelled.
        """
        self._remember_cancelled(ids, time.monotonic())
        for task, item in self._calls.items():
            if item.request.id in self._cancelled and task not in self._cancelled_calls:
                self._cancelled_calls.add(task)
                task.cancel()
        if self._jobs is not None:
            self._jobs.cancel(ids)
        self._wake()

    def _remember_cancelled(self, ids: list[bytes], now: float) -> None:
        """Remember the ids of cancelled requests for CANCELLED_KEPT_S seconds."""
        for id_ in ids:
            self._cancelled.pop(id_, None)  # move a known id to the end
            self._cancelled[id_] = now
        while self._cancelled:
            oldest = next(iter(self._cancelled))
            if now - self._cancelled[oldest] < CANCELLED_KEPT_S:
                return
            del self._cancelled[oldest]

    def take_waiting(self) -> list[QueuedRequest]:
        """Remove and return the requests that have not started, so that other replicas can get them."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    def discard_waiting(self) -> None:
        """Discard the waiting requests, because their channel has ended. The broker delivers them again."""
        self._waiting.clear()

    # --- start -----------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Start calls in the next iteration of the event loop."""
        if self._running and not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._start_calls)

    def _start_calls(self) -> None:
        self._due = False
        if not self._running:
            return
        self._start_waiting()
        self.start_jobs()
        self.on_change()

    def start_jobs(self) -> None:
        """Start jobs in the free slots, unless a request waits."""
        if self._jobs is None or self.requests_wait or not (free := self.free):
            return
        limit = min(job_slots(self._room.slots), self._job_calls + free)
        self._jobs.start_calls(free, limit, free)

    def _start_waiting(self) -> None:
        while self._waiting and (model := self._model) is not None and self._running:
            item = self._waiting[0]
            tokens, reason = _tokens(item), self._unwanted(item)
            # A request whose caller no longer waits needs no slot, and must not delay other requests.
            if reason is None and not self._room.fits(tokens, others=self._job_calls):
                return
            self._waiting.popleft()
            if reason is None:
                self._start(item, self._run(model, item), tokens)
            elif reason == "expired" and item.request.attempt:
                # The request may have run on another worker before. Then its caller may have a part of the
                # answer, and must learn that the rest will not come.
                self._start(item, self.answer_lost(item))
            else:
                self._finish(item, reason)

    def _start(self, item: QueuedRequest, work: Coroutine[Any, Any, None], tokens: int = 0) -> None:
        release = self._room.take(tokens)
        task = asyncio.create_task(work)
        self._calls[task] = item
        task.add_done_callback(lambda task: self._on_done(task, release))

    def _unwanted(self, item: QueuedRequest) -> str | None:
        """Return why the caller no longer waits for a request; None if it still waits."""
        if item.request.id in self._cancelled:
            return "cancelled"
        return "expired" if item.request.deadline_ms <= time.time() * 1e3 else None

    # --- run -------------------------------------------------------------------------------------------

    async def _run(self, model: Model, item: QueuedRequest) -> None:
        began, usage = time.monotonic(), TokenUsage()
        sample = self._sampler.stream(item.request.trace) if self._sampler is not None else None
        mark = self.stats.time.begin()

        def see(answer: ModelAnswer) -> None:
            usage.hear(answer.outputs)
            if sample is not None:
                sample.see(answer)

        try:
            chunks, outcome = await send_answers(
                self._replies, model, item, began, first_facts=self._facts, see=see
            )
        except BaseException:
            self.stats.time.waste(mark, "cancelled")
            raise
        finally:
            self.stats.time.add_tokens(item.request.tenant, *usage.tokens())
        count_stream_time(self.stats, mark, item, outcome)
        if isinstance(outcome, CallFailure):
            await self._on_failure(model, item, chunks, outcome)
            return
        if outcome != "cancelled":
            count_slot_success(self.stats, self._room.slots, item, began, time.monotonic() - began)
        if outcome == "ok":
            if sample is not None:
                sample.end()
            end = envelope.end_frame(item.request.id, item.request.attempt, chunks)
            await self._replies.reply_last(item.delivery.reply_to, end)
        self._finish(item, outcome)

    async def _on_failure(
        self, model: Model, item: QueuedRequest, chunks: int, failure: CallFailure[QueuedRequest]
    ) -> None:
        if failure.expired:
            self._finish(item, "expired")
            return
        error = failure.error
        if failure.lost:
            self._on_model_lost(model)
            error = WorkerLost(f"the model server was lost: {error.message}")
            LLM_LOST.labels("engine").inc()
        await self._fail(item, log_failure(item.request, error, chunks=chunks), self._replies.reply_last)

    async def answer_lost(self, item: QueuedRequest) -> None:
        """Answer a request with the error that an earlier worker was lost while it ran the request."""
        LLM_LOST.labels("worker").inc()
        error = WorkerLost("the worker was lost while it ran this request")
        await self._fail(item, error, self._replies.reply_only)

    async def _refuse(self, item: QueuedRequest) -> None:
        error = BadRequest("a language model returns many answers to a request: send the request as a stream")
        await self._fail(item, error, self._replies.reply_only)

    async def _fail(
        self,
        item: QueuedRequest,
        error: TidegateError,
        reply: Callable[[str, envelope.Buffer], Coroutine[Any, Any, None]],
    ) -> None:
        request = item.request
        count_failure(self.stats, item)
        frame = envelope.failure_frame(request.id, request.attempt, error.reason, error.message)
        await reply(item.delivery.reply_to, frame)
        self._finish(item, error.reason)

    def _on_done(self, task: asyncio.Task[None], release: Callable[[], None]) -> None:
        item = self._calls.pop(task)
        release()
        if task.cancelled():
            if (
                task in self._cancelled_calls
            ):  # otherwise the worker is stopping, and the request goes back to its queue
                self._finish(item, "cancelled")
        elif (error := task.exception()) is not None:
            # The request stays unsettled. When this worker has ended, another worker gets the request and
            # answers that this worker was lost.
            log.error("a request ended unexpectedly", exc_info=error)
        self._cancelled_calls.discard(task)
        self._wake()

    def _finish(self, item: QueuedRequest, outcome: str) -> None:
        ANSWERED.labels(outcome).inc()
        self._settle([item])

    def _on_model_lost(self, model: Model) -> None:
        if self._model is model:
            self.lose_model()
            self._on_lost(model)

    @asynccontextmanager
    async def _job_slot(self) -> AsyncIterator[None]:
        """Wait until an engine slot is free for a suspect job.

        A suspect need not run alone here, because requests in different engine slots do not affect each
        other.
        """
        while self.free <= 0 or self._job_calls >= job_slots(self._room.slots):
            await asyncio.sleep(SLOT_POLL_S)
        yield


def _tokens(item: QueuedRequest) -> int:
    """Return the estimated number of tokens of a prompt and its answer; 0 if the gateway sent no estimate."""
    try:
        tokens = envelope.read_call_key(item.request.key).parameters.get(KV_TOKENS, 0)
    except envelope.Undecodable:
        return 0  # the model call reports the error
    return tokens if isinstance(tokens, int) else 0
