"""Streams: requests to a decoupled model, each a call of its own that gives many answers.

An answer leaves as a CHUNK as soon as it is made, in order, then comes END. A stream that has emitted is
never tried again; one that has not is like any other request. Deliveries are settled as by the calls in
:mod:`services.worker.application.batch_scheduler`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import aclosing

from services.worker.adapters.metrics import ANSWERED, CHUNKS, FIRST_CHUNK_SECONDS
from services.worker.adapters.model import Model
from services.worker.adapters.model_call import ModelAnswer
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.adapters.request_log import failed
from services.worker.domain.backlog import QueuedRequest
from services.worker.domain.split import describe
from services.worker.domain.statistics import WorkStats
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import ModelFailed, TidegateError, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply

log = telemetry.logger(__name__)

# The gateway, which knows its caller's patience, cancels a stream that falls silent. This is for the case
# that its word was lost.
SILENCE_S = 600.0
_MOST_US = 2**32 - 1


class StreamScheduler:
    """Runs up to ``limit`` streams at once; what comes on top waits for its turn."""

    def __init__(
        self,
        publisher: ReplyPublisher,
        settle: Callable[[list[QueuedRequest]], None],
        stats: WorkStats,
        *,
        limit: int,
        cancelled: Callable[[bytes], bool],
        lost: Callable[[Model], None],
        died_alone: Callable[[], bool],
    ) -> None:
        self._publisher = publisher
        self._settle = settle
        self._stats = stats
        self._cancelled = cancelled
        self._lost = lost
        self._died_alone = died_alone
        self._model: Model | None = None
        self._waiting: deque[QueuedRequest] = deque()
        self._running: dict[asyncio.Task[None], QueuedRequest] = {}
        self._withdrawn: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.limit = limit
        self.withheld = False

    @property
    def in_hand(self) -> int:
        """Streams that wait here or run."""
        return len(self._waiting) + len(self._running)

    @property
    def running(self) -> int:
        """Return how many streams run."""
        return len(self._running)

    def go_on(self) -> None:
        """Begin streams again, which were withheld."""
        self.withheld = False
        self._begin()

    def begin(self, model: Model, item: QueuedRequest) -> asyncio.Task[None]:
        """Begin a stream now."""
        task = asyncio.create_task(self._stream(model, item))
        self._running[task] = item
        task.add_done_callback(self._ended)
        return task

    def add(self, item: QueuedRequest) -> None:
        """Take a request in."""
        self._waiting.append(item)
        self._begin()

    def use(self, model: Model | None) -> None:
        """The model to call from now on, or None while there is none."""
        self._model = model
        self._begin()

    def cancel(self) -> None:
        """Callers have gone: end their streams."""
        for task, item in self._running.items():
            if self._cancelled(item.request.id) and task not in self._withdrawn:
                self._withdrawn.add(task)
                task.cancel()

    def take_waiting(self) -> list[QueuedRequest]:
        """Take out the streams that have not begun."""
        found = list(self._waiting)
        self._waiting.clear()
        return found

    def clear(self) -> None:
        """Forget what waits: its channel has ended and the broker delivers it again."""
        self._waiting.clear()

    async def stop(self) -> None:
        """Stop at once; what is in hand stays unsettled and goes back to the queue."""
        self._stopping = True
        await tasks.end(*self._running)

    def _begin(self) -> None:
        if self.withheld:
            return
        while self._model is not None and not self._stopping and len(self._running) < self.limit:
            if not self._waiting:
                return
            item = self._waiting.popleft()
            if (gone := self._gone(item)) is not None:
                self._finish(item, gone)
                continue
            self.begin(self._model, item)

    def _gone(self, item: QueuedRequest) -> str | None:
        """Why nobody waits for it any more, if so."""
        if self._cancelled(item.request.id):
            return "cancelled"
        return "expired" if item.request.deadline_ms <= time.time() * 1e3 else None

    def _ended(self, task: asyncio.Task[None]) -> None:
        item = self._running.pop(task)
        if task.cancelled():
            if task in self._withdrawn:  # else the worker stops: unsettled, it goes back to the queue
                self._finish(item, "cancelled")
        elif (error := task.exception()) is not None:
            # Unsettled: the broker delivers it again, as another attempt.
            log.error("a stream ended unexpectedly", exc_info=error)
        self._withdrawn.discard(task)
        self._begin()

    async def _stream(self, model: Model, item: QueuedRequest) -> None:
        request, began = item.request, time.monotonic()
        chunks, told = await self._forward(model, item, began)
        if isinstance(told, Unavailable):
            self._lost(model)
        if isinstance(told, Unavailable) and chunks == 0:
            # Triton is gone and the caller has nothing yet: another attempt, by whoever is there.
            await self._publisher.again([item], alone=self._died_alone())
            self._settle([item])
            return
        if isinstance(told, TidegateError):
            told = failed(request, told, chunks=chunks)
            self._stats.failed += 1
            self._stats.tally.failed(1, time.monotonic() - item.received)
            frame = envelope.failure_frame(request.id, request.attempt, told.reason, told.message)
        else:
            frame = envelope.end_frame(request.id, request.attempt, chunks)
            self._measure(item, began)
        if told != "expired":
            await self._publisher.reply(item.delivery.reply_to, [frame])
        self._finish(item, told.reason if isinstance(told, TidegateError) else told)

    async def _forward(
        self, model: Model, item: QueuedRequest, began: float
    ) -> tuple[int, str | TidegateError]:
        """Send the answers as they come: how many there were, and "ok", "expired" or what went wrong."""
        loop = asyncio.get_running_loop()
        left_s = max(item.request.deadline_ms / 1e3 - time.time(), 0.001)
        silence_s = max(left_s, SILENCE_S)
        chunks, last = 0, began
        try:
            async with asyncio.timeout(left_s) as limit, aclosing(model.stream(item.request)) as answers:
                async for answer in answers:
                    now = time.monotonic()
                    limit.reschedule(loop.time() + silence_s)
                    chunk = _chunk(item, answer, chunks, began - item.received, now - last)
                    await self._publisher.reply(item.delivery.reply_to, [chunk], left_s=silence_s)
                    if chunks == 0:
                        FIRST_CHUNK_SECONDS.observe(now - began)
                    chunks, last = chunks + 1, now
                    CHUNKS.inc()
        except TimeoutError:
            return chunks, "expired"
        except TidegateError as error:
            lost = isinstance(error, Unavailable) and chunks > 0
            return chunks, Unavailable(
                "the model server was lost in the middle of the stream"
            ) if lost else error
        except Exception as error:
            log.exception(
                "a stream failed unexpectedly",
                extra={"request_id": telemetry.shown_id(item.request.trace)},
            )
            return chunks, ModelFailed(f"the stream could not go on: {error!r}")
        return chunks, "ok"

    def _measure(self, item: QueuedRequest, began: float) -> None:
        # As many others could have run beside it, so its share of the worker is that small. How long it took
        # says nothing about the wait for a first chunk: call_ms, which admission counts with, stays unknown.
        spent = time.monotonic() - began
        stats = self._stats
        stats.completed += 1
        stats.busy_s += spent / self.limit
        stats.batch.add(self.limit)
        stats.tally.answered(1, item.request.rows or 1, began - item.received, spent)

    def _finish(self, item: QueuedRequest, outcome: str) -> None:
        ANSWERED.labels(outcome).inc()
        self._settle([item])


def _chunk(
    item: QueuedRequest, answer: ModelAnswer, seq: int, waited_s: float, made_s: float
) -> Buffer | Reply:
    """An answer as a CHUNK, framed unless it is large; raises ModelFailed for one that is no message."""
    request = item.request
    rows, tensors = describe(answer.outputs, request.rows)
    data: list[Buffer] = [output.raw for output in answer.outputs]
    wait_us, compute_us = (min(int(s * 1e6), _MOST_US) for s in (waited_s, made_s))
    key = envelope.result_key(tensors, answer.parameters)
    if len(key) > envelope.MAX_KEY:
        raise ModelFailed(
            f"names, shapes and parameters of an answer take {len(key)} bytes; "
            f"the limit is {envelope.MAX_KEY}"
        )
    reply = Reply(request.id, envelope.CHUNK, request.attempt, seq, rows, wait_us, compute_us, 1, key, data)
    if sum(map(len, data)) > envelope.LARGE:
        return reply
    return b"".join(envelope.reply_pieces(reply))
