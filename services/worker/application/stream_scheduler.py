"""Runs streams: requests to a decoupled model, each in a separate call that returns many answers.

Each answer is sent immediately as a CHUNK, in order. END is sent after the last answer. A stream that has
sent an answer is never retried. Other streams are retried like other requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence

from services.worker.adapters.metrics import ANSWERED
from services.worker.adapters.model import Model
from services.worker.adapters.reply_publisher import GatewayGone, ReplyPublisher
from services.worker.adapters.request_log import log_failure
from services.worker.application.model_calls import (
    CallFailure,
    count_failure,
    count_slot_success,
    count_stream_time,
)
from services.worker.application.sequence_scheduler import lost_in_call
from services.worker.application.stream_answers import send_answers
from services.worker.domain.backlog import QueuedRequest
from services.worker.domain.statistics import WorkStats
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply

log = telemetry.logger(__name__)


class StreamScheduler:
    """Runs up to ``limit`` streams at the same time. Other streams wait.

    ``taken`` returns the number of open calls of jobs. These calls also count towards ``limit``. ``on_free``
    is called when a stream has ended, so that another call can start.
    """

    def __init__(
        self,
        publisher: ReplyPublisher,
        settle: Callable[[list[QueuedRequest]], None],
        stats: WorkStats,
        *,
        limit: int,
        cancelled: Callable[[bytes], bool],
        on_lost: Callable[[Model], None],
        died_alone: Callable[[], bool],
        taken: Callable[[], int] = lambda: 0,
        on_free: Callable[[], None] = lambda: None,
    ) -> None:
        self._publisher = publisher
        self._settle = settle
        self._stats = stats
        self._limit = limit
        self._cancelled = cancelled
        self._on_lost = on_lost
        self._died_alone = died_alone
        self._taken = taken
        self._on_free = on_free
        self._model: Model | None = None
        self._waiting: deque[QueuedRequest] = deque()
        self._running: dict[asyncio.Task[None], QueuedRequest] = {}
        self._cancelled_streams: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.paused = False

    @property
    def in_hand(self) -> int:
        """Return how many streams wait here or run."""
        return len(self._waiting) + len(self._running)

    @property
    def running(self) -> int:
        """Return how many streams run."""
        return len(self._running)

    def resume(self) -> None:
        """End a pause, and start the streams that wait."""
        self.paused = False
        self.start_waiting()

    def start(self, model: Model, item: QueuedRequest) -> asyncio.Task[None]:
        """Start a stream immediately, even if ``limit`` streams run already."""
        task = asyncio.create_task(self._run(model, item))
        self._running[task] = item
        task.add_done_callback(self._on_done)
        return task

    def add(self, item: QueuedRequest) -> None:
        """Queue a stream."""
        self._waiting.append(item)
        self.start_waiting()

    def use(self, model: Model | None) -> None:
        """Call ``model`` from now on. If it is None, start no streams."""
        self._model = model
        self.start_waiting()

    def cancel(self) -> None:
        """Cancel the running streams whose callers have cancelled."""
        for task, item in self._running.items():
            if self._cancelled(item.request.id) and task not in self._cancelled_streams:
                self._cancelled_streams.add(task)
                task.cancel()

    def take_waiting(self) -> list[QueuedRequest]:
        """Remove and return the streams that have not started."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    def discard_waiting(self) -> None:
        """Discard the waiting streams, because their channel has ended. The broker delivers them again."""
        self._waiting.clear()

    async def stop(self) -> None:
        """Stop immediately. Streams that wait or run stay unsettled, so the broker delivers them again."""
        self._stopping = True
        await tasks.end(*self._running)

    def start_waiting(self) -> None:
        """Start the streams that wait, while fewer than ``limit`` streams and calls of jobs run."""
        if self.paused:
            return
        while self._model is not None and not self._stopping and self._waiting:
            if len(self._running) + self._taken() >= self._limit:
                return
            item = self._waiting.popleft()
            if (reason := self._unwanted(item)) is not None:
                self._finish(item, reason)
                continue
            self.start(self._model, item)

    def _unwanted(self, item: QueuedRequest) -> str | None:
        """Return "cancelled" or "expired" if the caller no longer waits for the request; None if it waits."""
        if self._cancelled(item.request.id):
            return "cancelled"
        return "expired" if item.request.deadline_ms <= time.time() * 1e3 else None

    def _on_done(self, task: asyncio.Task[None]) -> None:
        item = self._running.pop(task)
        if task.cancelled():
            # If the caller has not cancelled the stream, this worker is stopping. Then the request stays
            # unsettled, and the broker delivers it again.
            if task in self._cancelled_streams:
                self._finish(item, "cancelled")
        elif (error := task.exception()) is not None:
            # The request stays unsettled. When the channel ends, the broker delivers it again, as another
            # attempt.
            log.error("a stream ended unexpectedly", exc_info=error)
        self._cancelled_streams.discard(task)
        self.start_waiting()
        self._on_free()

    async def _run(self, model: Model, item: QueuedRequest) -> None:
        began = time.monotonic()
        mark = self._stats.time.begin()
        try:
            replies = self._publisher if item.sequence is None else _Patient(self._publisher)
            chunks, outcome = await send_answers(replies, model, item, began)
        except BaseException:
            self._stats.time.waste(mark, "cancelled")
            raise
        count_stream_time(self._stats, mark, item, outcome)
        if isinstance(outcome, CallFailure):
            await self._on_failure(model, item, chunks, outcome)
            return
        if outcome != "cancelled":
            self._measure(item, began)
        if outcome == "ok":
            end = envelope.end_frame(item.request.id, item.request.attempt, chunks)
            with contextlib.suppress(GatewayGone):
                await self._publisher.send_chunks(item.delivery.reply_to, [end])
        self._finish(item, outcome)

    async def _on_failure(
        self, model: Model, item: QueuedRequest, chunks: int, failure: CallFailure[QueuedRequest]
    ) -> None:
        request, error = item.request, failure.error
        if item.sequence is not None:
            if failure.lost:
                self._on_lost(model)
                error = lost_in_call(request, error)
            item.sequence.error = error
        elif failure.lost:
            self._on_lost(model)
            if chunks == 0:
                # The caller has no answer yet, so another attempt may follow.
                await self._publisher.publish_lost([item], alone=self._died_alone())
                self._settle([item])
                return
            error = Unavailable("the model server was lost in the middle of the stream")
        error = log_failure(request, error, chunks=chunks)
        count_failure(self._stats, item)
        frame = envelope.failure_frame(request.id, request.attempt, error.reason, error.message)
        await self._reply(item, frame)
        self._finish(item, error.reason)

    async def _reply(self, item: QueuedRequest, frame: bytes) -> None:
        await self._publisher.reply(item.delivery.reply_to, [frame])

    def _measure(self, item: QueuedRequest, began: float) -> None:
        count_slot_success(self._stats, self._limit, item, began, time.monotonic() - began)

    def _finish(self, item: QueuedRequest, outcome: str) -> None:
        ANSWERED.labels(outcome).inc()
        self._settle([item])


class _Patient:
    """Sends the chunks of a sequence's request, even if its gateway process has ended.

    The call must run to its end. Otherwise the sequence's state would be changed only in part.
    """

    def __init__(self, publisher: ReplyPublisher) -> None:
        self._publisher = publisher

    async def send_chunks(self, reply_to: str, frames: Sequence[Buffer | Reply], *, left_s: float) -> None:
        """Send replies. If the gateway process has ended, the broker drops them."""
        await self._publisher.reply(reply_to, frames, left_s=left_s)
