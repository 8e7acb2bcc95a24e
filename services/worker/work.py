"""The worker's work: take what waits, call the model, answer, settle.

Every rule (deadline, retry, cancel) holds for each request, never for a whole message. A delivery is acked
when each of its requests was answered, given up as expired, or published again alone; it is never nacked.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from services.worker.adapters.model import Model
from services.worker.api.outbox import Outbox
from services.worker.domain.backlog import Backlog, Item
from services.worker.domain.pace import calls_in_flight
from services.worker.domain.split import Mismatch, Output, describe, split
from services.worker.domain.stats import Stats
from services.worker.metrics import ANSWERED, CALL_SECONDS, CALL_SIZE
from services.worker.streams import Streams
from tidegate import tasks, telemetry
from tidegate.errors import (
    BadRequest,
    DeadlinePassed,
    ModelFailed,
    PayloadTooLarge,
    TidegateError,
    Unavailable,
)
from tidegate.protocol import envelope
from tidegate.protocol.envelope import Buffer, Reply

log = telemetry.logger(__name__)

Settle = Callable[[list[Item]], None]


class Work:
    """Runs the model over the backlog. ``model`` None: Triton is away, the backlog waits.

    ``streams``: how many a decoupled model may have at once; 0: it is not decoupled.
    """

    def __init__(
        self,
        outbox: Outbox,
        settle: Settle,
        *,
        max_rows: int,
        window_s: float,
        instances: int,
        streams: int = 0,
    ) -> None:
        self._outbox = outbox
        self._settle = settle
        self._max_rows = max_rows
        self._window_s = window_s
        self._instances = instances
        self._wake = asyncio.Event()
        self._calls: dict[asyncio.Task[None], list[Item]] = {}
        self._withdrawn: set[asyncio.Task[None]] = set()
        self._cancelled: dict[bytes, float] = {}
        self._model: Model | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self.backlog = Backlog()
        self.stats = Stats()
        self.streams = Streams(
            outbox, settle, self.stats, limit=streams, cancelled=lambda id_: id_ in self._cancelled
        )

    @property
    def in_hand(self) -> int:
        """Requests that wait here or are in a call."""
        calls = sum(len(group) for group in self._calls.values())
        return len(self.backlog) + calls + self.streams.in_hand

    @property
    def in_flight(self) -> int:
        """How many calls may be open at once."""
        return self.streams.limit or calls_in_flight(
            instances=self._instances, batches=self._max_rows > 0, call_ms=self.stats.call_ms.value
        )

    @property
    def company(self) -> int:
        """Requests that a call waits for before it starts; 0: it takes what is there."""
        return self._max_rows if self._window_s else 0

    @property
    def batch(self) -> int:
        """Requests that a call can take together; 0: the model has no batch axis."""
        return self._max_rows

    def start(self) -> None:
        """Begin to work."""
        self._loop_task = asyncio.create_task(self._run(), name="work")

    async def stop(self) -> None:
        """Stop at once; what is in hand stays unsettled and goes back to the queue."""
        await tasks.end(self._loop_task, *self._calls)
        await self.streams.stop()

    async def drained(self) -> None:
        """Return when nothing is in hand any more."""
        while self.in_hand:
            await asyncio.sleep(0.005)

    def use(self, model: Model | None) -> None:
        """The model to call from now on, or None while there is none."""
        self._model = model
        self.streams.use(model)
        self._wake.set()

    def add(self, item: Item) -> None:
        """Take a request in."""
        if self.streams.limit and item.request.flags & envelope.STREAM:
            self.streams.add(item)
            return
        self.backlog.add(item)
        self._wake.set()

    def cancel(self, ids: list[bytes]) -> None:
        """Callers have gone: skip what waits; end a call when all of its requests are cancelled."""
        horizon = time.monotonic()
        self._cancelled = {id_: at for id_, at in self._cancelled.items() if horizon - at < 60.0}
        self._cancelled |= dict.fromkeys(ids, horizon)
        for task, group in self._calls.items():
            if all(item.request.id in self._cancelled for item in group):
                self._withdrawn.add(task)
                task.cancel()
        self.streams.cancel()

    def forget(self) -> None:
        """Forget what waits: its session has ended and the broker delivers it again."""
        self.backlog.clear()
        self.streams.clear()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            while self._model is not None and len(self.backlog) and len(self._calls) < self.in_flight:
                await self._window()
                group = self._live(self.backlog.take(self._max_rows))
                if group and self._model is not None:
                    task = asyncio.create_task(self._call(self._model, group))
                    self._calls[task] = group
                    task.add_done_callback(self._called)
            await self._wake.wait()

    def _called(self, task: asyncio.Task[None]) -> None:
        group = self._calls.pop(task)
        self._wake.set()
        withdrawn = task in self._withdrawn
        self._withdrawn.discard(task)
        if task.cancelled():
            if withdrawn:  # else the worker stops: unsettled, it goes back to the queue
                self._settle(group)
        elif (error := task.exception()) is not None:
            # Unsettled: the broker delivers it again, as another attempt.
            log.error("a call ended unexpectedly", exc_info=error)

    async def _window(self) -> None:
        """Wait for company, if the Deployment asks for it: it trades latency for fuller batches."""
        oldest = self.backlog.oldest()
        if not self._window_s or oldest is None or oldest.request.rows == 0:
            return
        while (left := oldest.received + self._window_s - time.monotonic()) > 0:
            if self.backlog.rows_at_head() >= self._max_rows:
                return
            await asyncio.sleep(min(left, 0.001))

    def _live(self, group: list[Item]) -> list[Item]:
        """Without those whose deadline has passed or whose caller has gone; these are settled unanswered."""
        now_ms = time.time() * 1e3
        live, gone = [], []
        for item in group:
            if item.request.deadline_ms <= now_ms:
                ANSWERED.labels("expired").inc()
                gone.append(item)
            elif self._cancelled and item.request.id in self._cancelled:
                ANSWERED.labels("cancelled").inc()
                gone.append(item)
            else:
                live.append(item)
        if gone:
            self._settle(gone)
        return live

    async def _call(self, model: Model, group: list[Item]) -> None:
        started = time.monotonic()
        timeout_s = max(max(item.request.deadline_ms for item in group) / 1e3 - time.time(), 0.001)
        try:
            outputs = await model.call([item.request for item in group], timeout_s)
            spent = time.monotonic() - started
            frames = _answers(group, outputs, started, spent)
        except (BadRequest, ModelFailed, PayloadTooLarge, Mismatch, envelope.Undecodable) as error:
            await self._on_model_error(model, group, error)
            return
        except DeadlinePassed:
            self._count("expired", group)
            self._settle(group)
            return
        except Unavailable:
            # Triton is gone in the middle of a call: any of these may be what killed it.
            await self._outbox.again(group)
            self._settle(group)
            return
        except Exception as error:
            # Nobody thought of it. Its caller is told: unsettled, it would hold a place here for ever.
            log.exception("a call failed unexpectedly")
            await self._on_model_error(model, group, ModelFailed(f"the request could not be run: {error!r}"))
            return
        self._measure(spent, group, started)
        self._count("ok", group)
        await self._reply(group, frames)

    async def _on_model_error(self, model: Model, group: list[Item], error: Exception) -> None:
        """A bad request must not fail its neighbours: each is tried alone; a single one is told."""
        if len(group) > 1:
            for item in group:
                await self._call(model, [item])
            return
        told = error if isinstance(error, TidegateError) else ModelFailed(str(error))
        request = group[0].request
        self.stats.failed += 1
        self.stats.tally.failed(1, time.monotonic() - group[0].received)
        self._count(told.reason, group)
        frame = envelope.failure_frame(request.id, request.attempt, told.reason, told.message)
        await self._reply(group, [frame], answered=False)

    async def _reply(
        self, group: list[Item], frames: Sequence[Buffer | Reply], *, answered: bool = True
    ) -> None:
        by_gateway: dict[str, list[Buffer | Reply]] = defaultdict(list)
        for item, frame in zip(group, frames, strict=True):
            by_gateway[item.parcel.reply_to].append(frame)
            if answered and item.request.flags & envelope.STREAM:
                end = envelope.end_frame(item.request.id, item.request.attempt, 1)
                by_gateway[item.parcel.reply_to].append(end)
        left_s = max(item.request.deadline_ms for item in group) / 1e3 - time.time()
        for reply_to, answers in by_gateway.items():
            await self._outbox.reply(reply_to, answers, left_s=left_s)
        self._settle(group)

    def _measure(self, spent: float, group: list[Item], started: float) -> None:
        requests, rows, waited = len(group), 0, 0.0
        for item in group:
            rows += item.request.rows or 1
            waited += started - item.received
        self.stats.tally.answered(requests, rows, waited, spent)
        self.stats.completed += requests
        self.stats.busy_s += spent
        self.stats.call_ms.add(spent * 1e3)
        self.stats.batch.add(requests)
        CALL_SECONDS.observe(spent)
        CALL_SIZE.observe(requests)

    @staticmethod
    def _count(outcome: str, group: list[Item]) -> None:
        ANSWERED.labels(outcome).inc(len(group))


def _answers(group: list[Item], outputs: list[Output], started: float, spent: float) -> list[bytes | Reply]:
    """A reply for each request, framed unless it is large; raises Mismatch when it cannot be divided."""
    rows = sum(item.request.rows for item in group)
    answer_rows, tensors = describe(outputs, rows)
    if len(group) == 1:
        parts: list[list[Buffer]] = [[output.raw for output in outputs]]
    else:
        parts = split(outputs, [item.request.rows for item in group])
    key = envelope.result_key(tensors)
    compute_us, shared = int(spent * 1e6), len(group)
    answers: list[bytes | Reply] = []
    for item, part in zip(group, parts, strict=True):
        id_, attempt = item.request.id, item.request.attempt
        rows = item.request.rows if answer_rows else 0
        wait_us = int((started - item.received) * 1e6)
        # For who takes many answers it is the first and, with the END behind it, the only one.
        status = envelope.CHUNK if item.request.flags & envelope.STREAM else envelope.OK
        if sum(map(len, part)) > envelope.LARGE:
            reply = Reply(id_, status, attempt, 0, rows, wait_us, compute_us, shared, key, part)
            answers.append(reply)
        else:
            times = {"wait_us": wait_us, "compute_us": compute_us, "shared": shared}
            answers.append(envelope.reply_frame(id_, attempt, rows, key, part, status=status, **times))
    return answers
