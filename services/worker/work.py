"""The worker's work: take what waits, call the model, answer, settle.

Every rule (deadline, retry, cancel) holds for each request, never for a whole message. A delivery is acked
when each of its requests was answered, given up as expired, or published again alone; it is never nacked.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable

from services.worker.adapters.model import Model
from services.worker.api.outbox import Outbox
from services.worker.domain.backlog import Backlog, Item
from services.worker.domain.pace import Mean, calls_in_flight
from services.worker.domain.split import Mismatch, Output, describe, split
from services.worker.metrics import ANSWERED, CALL_SECONDS, CALL_SIZE
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
from tidegate.protocol.envelope import Buffer

log = telemetry.logger(__name__)

Settle = Callable[[list[Item]], None]


class Stats:
    """What the heartbeat tells of the work."""

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.busy_s = 0.0
        self.call_ms = Mean()
        self.batch = Mean()


class Work:
    """Runs the model over the backlog. ``model`` None: Triton is away, the backlog waits."""

    def __init__(
        self, outbox: Outbox, settle: Settle, *, max_rows: int, window_s: float, instances: int
    ) -> None:
        self._outbox = outbox
        self._settle = settle
        self._max_rows = max_rows
        self._window_s = window_s
        self._instances = instances
        self._wake = asyncio.Event()
        self._calls: dict[asyncio.Task[None], list[Item]] = {}
        self._cancelled: dict[bytes, float] = {}
        self._model: Model | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self.backlog = Backlog()
        self.stats = Stats()

    @property
    def in_hand(self) -> int:
        """Requests that wait here or are in a call."""
        return len(self.backlog) + sum(len(group) for group in self._calls.values())

    @property
    def in_flight(self) -> int:
        """How many calls may be open at once."""
        return calls_in_flight(
            instances=self._instances, batches=self._max_rows > 0, call_ms=self.stats.call_ms.value
        )

    def start(self) -> None:
        """Begin to work."""
        self._loop_task = asyncio.create_task(self._run(), name="work")

    async def stop(self) -> None:
        """Stop at once; what is in hand stays unsettled and goes back to the queue."""
        await tasks.end(self._loop_task, *self._calls)

    async def drained(self) -> None:
        """Return when nothing is in hand any more."""
        while self.in_hand:
            await asyncio.sleep(0.005)

    def use(self, model: Model | None) -> None:
        """The model to call from now on, or None while there is none."""
        self._model = model
        self._wake.set()

    def add(self, item: Item) -> None:
        """Take a request in."""
        self.backlog.add(item)
        self._wake.set()

    def cancel(self, ids: list[bytes]) -> None:
        """Callers have gone: skip what waits; end a call when all of its requests are cancelled."""
        horizon = time.monotonic()
        self._cancelled = {id_: at for id_, at in self._cancelled.items() if horizon - at < 60.0}
        self._cancelled |= dict.fromkeys(ids, horizon)
        for task, group in self._calls.items():
            if all(item.request.id in self._cancelled for item in group):
                task.cancel()

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
        if task.cancelled():
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
        self._measure(spent, len(group))
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
        self._count(told.reason, group)
        frame = envelope.failure_frame(request.id, request.attempt, told.reason, told.message)
        await self._reply(group, [frame])

    async def _reply(self, group: list[Item], frames: list[bytes]) -> None:
        by_gateway: dict[str, list[Buffer]] = defaultdict(list)
        for item, frame in zip(group, frames, strict=True):
            by_gateway[item.parcel.reply_to].append(frame)
        for reply_to, answers in by_gateway.items():
            await self._outbox.reply(reply_to, answers)
        self._settle(group)

    def _measure(self, spent: float, requests: int) -> None:
        self.stats.completed += requests
        self.stats.busy_s += spent
        self.stats.call_ms.add(spent * 1e3)
        self.stats.batch.add(requests)
        CALL_SECONDS.observe(spent)
        CALL_SIZE.observe(requests)

    @staticmethod
    def _count(outcome: str, group: list[Item]) -> None:
        ANSWERED.labels(outcome).inc(len(group))


def _answers(group: list[Item], outputs: list[Output], started: float, spent: float) -> list[bytes]:
    """A reply frame for each request; raises Mismatch when the answer cannot be divided."""
    rows = sum(item.request.rows for item in group)
    answer_rows, tensors = describe(outputs, rows)
    if len(group) == 1:
        parts: list[list[Buffer]] = [[output.raw for output in outputs]]
    else:
        parts = split(outputs, [item.request.rows for item in group])
    key = envelope.result_key(tensors)
    return [
        envelope.reply_frame(
            item.request.id,
            item.request.attempt,
            item.request.rows if answer_rows else 0,
            key,
            part,
            wait_us=int((started - item.received) * 1e6),
            compute_us=int(spent * 1e6),
            shared=len(group),
        )
        for item, part in zip(group, parts, strict=True)
    ]
