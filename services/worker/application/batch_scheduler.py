"""Runs requests: takes them from the backlog, calls the model, replies, and settles deliveries.

A delivery can hold several requests. Deadlines, retries and cancellations apply to single requests, never to
a whole delivery. A delivery is acked when all of its requests are settled. A request is settled when it was
answered, cancelled or published again, or when it has expired. A delivery is never nacked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from services.worker.adapters.metrics import ANSWERED, SUSPECTS
from services.worker.adapters.model import Model
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.adapters.request_log import log_failure, log_request
from services.worker.application.job_scheduler import JobScheduler
from services.worker.application.model_calls import (
    CallFailure,
    count_failure,
    count_success,
    decide_failure,
    replies_to,
)
from services.worker.application.sampler import Sampler
from services.worker.application.sequence_scheduler import lost_in_call, sequence_scheduler
from services.worker.application.stream_scheduler import StreamScheduler
from services.worker.domain.backlog import Backlog, QueuedRequest
from services.worker.domain.concurrency import CallLimits, calls_in_flight, effective_concurrency, job_calls
from services.worker.domain.statistics import WorkStats
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply
from tidegate.kernel.protocol.models import SequenceSpec

log = telemetry.logger(__name__)

Settle = Callable[[list[QueuedRequest]], None]
SendReplies = Callable[[list[QueuedRequest], Mapping[str, Sequence[Buffer | Reply]]], bool]
OnLost = Callable[[Model], None]

# A suspect waits at most this many seconds for the calls in flight to end. If such a call kills the worker,
# it usually does so within this time.
OTHERS_END_S = 5.0
CANCELLED_KEPT_S = 60.0


class BatchScheduler:
    """Calls the model with the requests of the backlog. While Triton restarts, the requests wait.

    ``send_replies`` sends small replies in one write, and settles their requests. If it returns False,
    ``publisher`` sends the replies, and then ``settle`` is called.

    If a model server ends during a call, ``on_lost`` is called with its model. After that, no call starts
    until :meth:`use` is called with a model. ``sequences``: the settings of a stateful model's sequences;
    None if the model is not stateful.
    """

    def __init__(
        self,
        publisher: ReplyPublisher,
        settle: Settle,
        send_replies: SendReplies,
        limits: CallLimits,
        *,
        on_lost: OnLost,
        jobs: JobScheduler | None = None,
        sampler: Sampler | None = None,
        sequences: SequenceSpec | None = None,
    ) -> None:
        self.sequences = sequence_scheduler(sequences, limits.instances, self, limits.max_concurrency)
        self._publisher = publisher
        self._settle = settle
        self._send_replies = send_replies
        self._limits = limits
        # Copied from `limits` to save time, because each call reads these values.
        self._max_rows = limits.max_rows
        self._max_concurrency = limits.max_concurrency
        self._window_s = limits.window_s
        self._on_lost = on_lost
        self._running = self._start_due = False
        self._window_timer: asyncio.TimerHandle | None = None
        self._calls: dict[asyncio.Task[None], list[QueuedRequest]] = {}
        self._cancelled_calls: set[asyncio.Task[None]] = set()
        self._cancelled: dict[bytes, float] = {}
        self._model: Model | None = None
        self._isolating = asyncio.Lock()
        self._paused = self._died_alone = False
        self._jobs = jobs
        self._sampler = sampler
        # True if the model server was lost while a suspect ran alone in it.
        self.suspect_died = False
        self.backlog = Backlog()
        self.stats = jobs.stats if jobs is not None else WorkStats()
        if jobs is not None:
            jobs.wake, jobs.on_lost, jobs.alone = self._wake, self._on_model_lost, self.alone
        self.streams = StreamScheduler(
            publisher,
            settle,
            self.stats,
            limit=limits.streams,
            cancelled=lambda id_: id_ in self._cancelled,
            on_lost=self._on_model_lost,
            died_alone=lambda: self._died_alone,
            taken=lambda: jobs.open_calls if jobs is not None else 0,
            on_free=self._wake,
        )

    @property
    def serving(self) -> bool:
        """Return True if this worker runs requests now and has a model."""
        return self._running and self._model is not None

    @property
    def in_hand(self) -> int:
        """Return how many requests and jobs wait here or are in a call."""
        calls = sum(len(group) for group in self._calls.values())
        jobs = len(self._jobs.by_id) if self._jobs else 0
        behind = self.sequences.waiting if self.sequences else 0
        return len(self.backlog) + calls + self.streams.in_hand + jobs + behind

    @property
    def kept_sequences(self) -> int:
        """Return how many sequences of a stateful model this worker keeps."""
        return self.sequences.kept if self.sequences else 0

    @property
    def sequence_slots(self) -> int:
        """Return how many sequences this worker can keep; 0 if its model is not stateful."""
        return self.sequences.slots if self.sequences else 0

    @property
    def copies(self) -> int:
        """Return how many of the requests ``in_hand`` are copies for shadow traffic."""
        calls = sum(len(group) for group in self._calls.values() if group[0].request.flags & envelope.COPY)
        return self.backlog.copies + calls

    @property
    def max_calls(self) -> int:
        """Return the maximum number of calls in flight."""
        limits = self._limits
        return limits.streams or calls_in_flight(
            instances=limits.instances,
            batches=self._max_rows > 0,
            call_ms=self.stats.call_ms.value,
            shared=not self._max_rows and self.backlog.shared(time.monotonic()),
        )

    @property
    def decoupled(self) -> bool:
        """Return True if the model is decoupled. Then each streamed request uses a call of its own."""
        return self._limits.streams > 0

    @property
    def awaited_batch(self) -> int:
        """Return for how many rows a call waits during the batching window; 0 if calls do not wait."""
        return self._max_rows if self._window_s else 0

    @property
    def max_batch(self) -> int:
        """Return how many rows fit into one call; 0 if the model has no batch axis."""
        return self._max_rows

    @property
    def effective_concurrency(self) -> float:
        """Return how many requests this replica completes in the time of one call, under full load."""
        return effective_concurrency(
            instances=self._limits.instances,
            batch=self._max_rows,
            call_rows=self.stats.rows.value,
            call_requests=self.stats.batch.value,
            open_calls=self.stats.open_calls.value,
            max_concurrency=self._max_concurrency,
        )

    def start(self) -> None:
        """Start to run requests."""
        self._running = True
        self._wake()

    async def stop(self) -> None:
        """Stop immediately. The requests here stay unsettled, so the broker delivers them again."""
        self._running = False
        if self.sequences is not None:
            await self.sequences.stop()
        await tasks.end(*self._calls)
        await self.streams.stop()
        if self._jobs is not None:
            await self._jobs.stop()

    def use(self, model: Model | None) -> None:
        """Call ``model`` from now on. If it is None, start no calls."""
        self._model = model
        self.streams.use(model)
        if self.sequences is not None and model is not None:
            self.sequences.serve()
        if self._jobs is not None:
            self._jobs.use(model)
        self._wake()

    def lose_model(self) -> None:
        """Start no more calls, because the model server has ended.

        A new call would fail, and each of its requests would lose one attempt.
        """
        if self._model is not None:
            self._died_alone = self._open_calls() == 1
            self.suspect_died = self._died_alone and self._paused
            self.use(None)
            if self.sequences is not None:
                self.sequences.lose()

    def _on_model_lost(self, model: Model) -> None:
        if self._model is model:
            self.lose_model()
            self._on_lost(model)

    def take_waiting(self) -> list[QueuedRequest]:
        """Remove and return the requests that are in no call, so that other replicas can get them."""
        return [*self.backlog.take_all(), *self.streams.take_waiting()]

    def _open_calls(self) -> int:
        return len(self._calls) + self.streams.running + (self._jobs.open_calls if self._jobs else 0)

    def caller_timeouts_s(self) -> list[float]:
        """Return one number of seconds for each call in flight: the longest timeout of its requests.

        A request's timeout is the time from its arrival here to its deadline. For jobs and streams, the
        timeout is infinite.
        """
        offset = time.monotonic() - time.time()
        timeouts = [
            max(item.request.deadline_ms / 1e3 + offset - item.received for item in group)
            for group in self._calls.values()
        ]
        return timeouts + [math.inf] * (self.streams.running + (self._jobs.open_calls if self._jobs else 0))

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Return a context in which the scheduler starts no queued request.

        At its beginning, wait until no call is in flight. If calls are still in flight after ``OTHERS_END_S``
        seconds, wait only until ``max_concurrency`` allows one more request.
        """
        async with self._isolating:
            self._paused = self.streams.paused = True
            try:
                others_end = time.monotonic() + OTHERS_END_S
                while self._open_calls() and (time.monotonic() < others_end or not self._free_requests()):
                    await asyncio.sleep(0.002)
                yield
            finally:
                self._paused = False
                self.streams.resume()
                self._wake()

    def call_alone(self, item: QueuedRequest) -> asyncio.Task[None] | None:
        """Start a suspect, inside :meth:`alone`. If its caller no longer waits, settle it and return None."""
        assert self._model is not None
        if not (group := self._drop_unwanted([item])):
            return None
        SUSPECTS.inc()
        if self._limits.streams and item.request.flags & envelope.STREAM:
            return self.streams.start(self._model, item)
        return self._start_call(self._model, group)

    def call_in_sequence(self, item: QueuedRequest) -> asyncio.Task[None] | None:
        """Start the call of one request of a sequence.

        Return None if there is no model. If the caller no longer waits, settle the request and return None.
        """
        if (model := self._model) is None or not (group := self._drop_unwanted([item])):
            return None
        if self._limits.streams and item.request.flags & envelope.STREAM:
            return self.streams.start(model, item)
        return self._start_call(model, group)

    async def refuse(self, item: QueuedRequest, error: TidegateError) -> None:
        """Answer a request with an error."""
        await self._reply_failure(item, log_failure(item.request, error))

    def add(self, item: QueuedRequest) -> None:
        """Queue a request."""
        if self._limits.streams and item.request.flags & envelope.STREAM:
            self.streams.add(item)
            return
        self.backlog.add(item)
        self._wake()

    def cancel(self, ids: list[bytes]) -> None:
        """Cancel requests, streams and jobs. A call in flight ends if all of its requests are cancelled."""
        now = time.monotonic()
        self._cancelled = {id_: at for id_, at in self._cancelled.items() if now - at < CANCELLED_KEPT_S}
        self._cancelled |= dict.fromkeys(ids, now)
        for task, group in self._calls.items():
            # A call of a sequence is not cancelled, because the sequence's state would be unknown after that.
            if group[0].sequence is None and all(item.request.id in self._cancelled for item in group):
                self._cancelled_calls.add(task)
                task.cancel()
        self.streams.cancel()
        if self._jobs is not None:
            self._jobs.cancel(ids)

    def discard_waiting(self) -> None:
        """Discard the waiting requests, because their channel has ended. The broker delivers them again."""
        self.backlog.clear()
        self.streams.discard_waiting()
        if self.sequences is not None:
            self.sequences.discard_waiting()

    def _wake(self) -> None:
        """Start calls in the next iteration of the event loop."""
        if self._running and not self._start_due:
            self._start_due = True
            asyncio.get_running_loop().call_soon(self._start_calls)

    def _start_calls(self) -> None:
        self._start_due = False
        if not self._running or self._paused:
            return
        while (
            (model := self._model) is not None
            and len(self.backlog)
            and self._free_calls()
            and self._free_requests()
        ):
            if self._waits_for_batch():
                return
            group = self._drop_unwanted(self.backlog.take(min(self._max_rows, self._free_requests())))
            if group:
                self._start_call(model, group)
        if self._limits.streams:
            self.streams.start_waiting()
        if self._jobs is not None:
            self._jobs.start_calls(self._free_calls(), job_calls(self.max_calls), self._free_requests())

    def _start_call(self, model: Model, group: list[QueuedRequest]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._call(model, group))
        self._calls[task] = group
        task.add_done_callback(self._on_call_done)
        return task

    def _free_calls(self) -> int:
        """Return how many calls may start now. Queued requests use them first, and jobs use the rest.

        A stream that waits is counted like a call in flight, because waiting streams get the next free calls.
        """
        in_use = len(self._calls) + (self._jobs.open_calls if self._jobs else 0)
        if self._limits.streams:
            in_use += self.streams.in_hand
        return max(0, self.max_calls - in_use)

    def _free_requests(self) -> int:
        """Return how many more requests the Deployment's ``max_concurrency`` allows in calls."""
        if self._max_concurrency is None:
            return sys.maxsize
        in_calls = sum(map(len, self._calls.values())) + (self._jobs.in_calls if self._jobs else 0)
        return max(0, self._max_concurrency - in_calls)

    def _on_call_done(self, task: asyncio.Task[None]) -> None:
        group = self._calls.pop(task)
        self._wake()
        cancelled = task in self._cancelled_calls
        self._cancelled_calls.discard(task)
        if task.cancelled():
            if cancelled:  # otherwise the worker is stopping, and the broker delivers the requests again
                self._settle(group)
        elif (error := task.exception()) is not None:
            # The requests stay unsettled. When this worker's channel ends, the broker delivers them again,
            # for another attempt.
            log.error("a call ended unexpectedly", exc_info=error)

    def _waits_for_batch(self) -> bool:
        """Return True, and set a timer, if the next call waits until the end of its batching window."""
        oldest = self.backlog.oldest() if self._window_s else None
        if oldest is None or oldest.request.rows == 0 or self.backlog.rows_at_head() >= self._max_rows:
            return False
        left = oldest.received + self._window_s - time.monotonic()
        if left > 0:
            if self._window_timer is not None:
                self._window_timer.cancel()  # the old timer may be set for a later time
            self._window_timer = asyncio.get_running_loop().call_later(left, self._wake)
        return left > 0

    def _drop_unwanted(self, group: list[QueuedRequest]) -> list[QueuedRequest]:
        """Settle expired and cancelled requests without a reply. Return the other requests of the group."""
        now_ms = time.time() * 1e3
        wanted, unwanted = [], []
        for item in group:
            if item.request.deadline_ms <= now_ms:
                ANSWERED.labels("expired").inc()
                unwanted.append(item)
            elif self._cancelled and item.request.id in self._cancelled:
                ANSWERED.labels("cancelled").inc()
                unwanted.append(item)
            else:
                wanted.append(item)
        if unwanted:
            self._settle(unwanted)
        return wanted

    async def _call(self, model: Model, group: list[QueuedRequest]) -> None:
        started, ledger = time.monotonic(), self.stats.time
        mark = ledger.begin()
        self.stats.open_calls.add(len(self._calls) + (self._jobs.open_calls if self._jobs else 0))
        timeout_s = max(max(item.request.deadline_ms for item in group) / 1e3 - time.time(), 0.001)
        try:
            answer = await model.call([item.request for item in group], timeout_s)
            spent = time.monotonic() - started
            replies = replies_to(group, answer, started, spent)
        except Exception as error:
            failure = decide_failure(group, error, "the request could not be run")
            ledger.waste(mark, failure.waste, len(group))
            await self._on_failure(model, failure)
            return
        except BaseException:
            ledger.waste(mark, "cancelled", len(group))
            raise
        ledger.answered(mark, group, time.time() * 1e3, self._cancelled)
        # Send the replies first, because callers wait for them. Count the call before `_publish_replies`,
        # because `_publish_replies` may wait long for the broker.
        unsent = self._reply(group, replies)
        count_success(self.stats, group, started, spent)
        self._count("ok", group)
        if unsent:
            await self._publish_replies(group, unsent)
        if (sampler := self._sampler) is not None and sampler.wants:
            sampler.add(group, answer)

    async def _on_failure(self, model: Model, failure: CallFailure[QueuedRequest]) -> None:
        if failure.expired:
            self._count("expired", failure.expired)
            self._settle(list(failure.expired))
        if failure.lost:
            self._on_model_lost(model)
            for item in failure.lost:
                shared = len(failure.lost)
                log_request(
                    logging.WARNING,
                    "the model server was lost while a request ran",
                    item.request,
                    shared=shared,
                )
            if (first := failure.lost[0]).sequence is not None:
                await self._reply_failure(first, lost_in_call(first.request, failure.error))
                return
            alone = self._died_alone and len(failure.lost) == 1
            await self._publisher.publish_lost(failure.lost, alone=alone)
            self._settle(list(failure.lost))
        for item in failure.failed:
            await self._reply_failure(item, log_failure(item.request, failure.error))
        for item in failure.retried:
            if self._model is not model:  # the server ended in an earlier retry of this group
                self.add(item)
            elif self._drop_unwanted([item]):
                await self._call(model, [item])

    async def _reply_failure(self, item: QueuedRequest, error: TidegateError) -> None:
        request = item.request
        if item.sequence is not None:
            item.sequence.error = error
        count_failure(self.stats, item)
        self._count(error.reason, [item])
        frame = envelope.failure_frame(request.id, request.attempt, error.reason, error.message)
        if unsent := self._reply([item], [frame], answered=False):
            await self._publish_replies([item], unsent)

    def _reply(
        self, group: list[QueuedRequest], frames: Sequence[Buffer | Reply], *, answered: bool = True
    ) -> Mapping[str, Sequence[Buffer | Reply]]:
        """Send the replies in one write, and settle their requests. Return {} if this succeeds.

        If this is impossible, return the replies grouped by gateway. ``answered``: False for errors.
        """
        by_gateway: dict[str, list[Buffer | Reply]] = defaultdict(list)
        for item, frame in zip(group, frames, strict=True):
            by_gateway[item.delivery.reply_to].append(frame)
            if answered and item.request.flags & envelope.STREAM:
                end = envelope.end_frame(item.request.id, item.request.attempt, 1)
                by_gateway[item.delivery.reply_to].append(end)
        return {} if self._send_replies(group, by_gateway) else by_gateway

    async def _publish_replies(
        self, group: list[QueuedRequest], by_gateway: Mapping[str, Sequence[Buffer | Reply]]
    ) -> None:
        left_s = max(item.request.deadline_ms for item in group) / 1e3 - time.time()
        for reply_to, replies in by_gateway.items():
            await self._publisher.reply(reply_to, replies, left_s=left_s)
        self._settle(group)

    @staticmethod
    def _count(outcome: str, group: Sequence[QueuedRequest]) -> None:
        ANSWERED.labels(outcome).inc(len(group))
