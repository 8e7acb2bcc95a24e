"""The worker's work: take what waits, call the model, answer, settle.

Every rule (deadline, retry, cancel) holds for each request, never for a whole message. A delivery is acked
when each of its requests was answered, given up as expired, or published again alone; it is never nacked.
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
from services.worker.adapters.request_log import failed, note
from services.worker.application.job_scheduler import JobScheduler
from services.worker.application.model_calls import answers, as_told, divided, measure
from services.worker.application.stream_scheduler import StreamScheduler
from services.worker.domain.backlog import Backlog, QueuedRequest
from services.worker.domain.concurrency import calls_in_flight, job_calls
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
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply

log = telemetry.logger(__name__)

Settle = Callable[[list[QueuedRequest]], None]
Answer = Callable[[list[QueuedRequest], Mapping[str, Sequence[Buffer | Reply]]], bool]
Lost = Callable[[Model], None]

# A suspect waits so long for what runs already. A call or stream that takes longer has killed nobody so far.
OTHERS_END_S = 5.0


class BatchScheduler:
    """Runs the model over the backlog. ``model`` None: Triton is away, the backlog waits.

    ``answer`` sends replies and settles their requests; where it does not take them, the outbox sends them
    and ``settle`` follows.

    ``on_lost`` is called with a model whose server was gone in the middle of a call; nothing is called
    then until :meth:`use`. ``max_concurrency``: requests in calls at once, at most. ``streams``: how many
    a decoupled model may have at once; 0: it is not decoupled.
    """

    def __init__(
        self,
        publisher: ReplyPublisher,
        settle: Settle,
        answer: Answer,
        *,
        max_rows: int,
        window_s: float,
        instances: int,
        on_lost: Lost,
        max_concurrency: int | None = None,
        streams: int = 0,
        jobs: JobScheduler | None = None,
    ) -> None:
        self._publisher = publisher
        self._settle = settle
        self._answer = answer
        self._max_rows = max_rows
        self._window_s = window_s
        self._instances = instances
        self._max_concurrency = max_concurrency
        self._on_lost = on_lost
        self._working = self._due = False
        self._window_ends: asyncio.TimerHandle | None = None
        self._calls: dict[asyncio.Task[None], list[QueuedRequest]] = {}
        self._withdrawn: set[asyncio.Task[None]] = set()
        self._cancelled: dict[bytes, float] = {}
        self._model: Model | None = None
        self._isolating = asyncio.Lock()
        self._withheld = self._died_alone = False
        self._jobs = jobs
        # The model server was lost while a suspect ran alone in it.
        self.suspect_died = False
        self.backlog = Backlog()
        self.stats = jobs.stats if jobs is not None else WorkStats()
        if jobs is not None:
            jobs.wake, jobs.lost, jobs.alone = self._wake, self._lose, self.alone
        self.streams = StreamScheduler(
            publisher,
            settle,
            self.stats,
            limit=streams,
            cancelled=lambda id_: id_ in self._cancelled,
            lost=self._lose,
            died_alone=lambda: self._died_alone,
        )

    @property
    def serving(self) -> bool:
        """Return whether there is a model to call."""
        return self._working and self._model is not None

    @property
    def in_hand(self) -> int:
        """Requests that wait here or are in a call."""
        calls = sum(len(group) for group in self._calls.values())
        return len(self.backlog) + calls + self.streams.in_hand + (len(self._jobs.by_id) if self._jobs else 0)

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
        self._working = True
        self._wake()

    async def stop(self) -> None:
        """Stop at once; what is in hand stays unsettled and goes back to the queue."""
        self._working = False
        await tasks.end(*self._calls)
        await self.streams.stop()
        if self._jobs is not None:
            await self._jobs.stop()

    async def drained(self) -> None:
        """Return when nothing is in hand any more."""
        while self.in_hand:
            await asyncio.sleep(0.005)

    def use(self, model: Model | None) -> None:
        """The model to call from now on, or None while there is none."""
        self._model = model
        self.streams.use(model)
        if self._jobs is not None:
            self._jobs.use(model)
        self._wake()

    def lose(self) -> None:
        """Begin no more calls: an attempt on a server that is gone would count as one that killed it."""
        if self._model is not None:
            self._died_alone = self._open_calls() == 1
            self.suspect_died = self._died_alone and self._withheld
            self.use(None)

    def _lose(self, model: Model) -> None:
        if self._model is model:
            self.lose()
            self._on_lost(model)

    def take_waiting(self) -> list[QueuedRequest]:
        """Take out the requests that are in no call yet, for other replicas."""
        return [*self.backlog.take_all(), *self.streams.take_waiting()]

    def _open_calls(self) -> int:
        return len(self._calls) + self.streams.running + (self._jobs.calling if self._jobs else 0)

    def waiting(self) -> list[float]:
        """Return for how many seconds the callers of each open call wait; jobs and streams wait for ever."""
        offset = time.monotonic() - time.time()
        found = [
            max(item.request.deadline_ms / 1e3 + offset - item.received for item in group)
            for group in self._calls.values()
        ]
        return found + [math.inf] * (self.streams.running + (self._jobs.calling if self._jobs else 0))

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Begin nothing in the body but what :meth:`call_alone` does, so that a loss can be charged to it.

        What runs is waited for up to ``OTHERS_END_S``, and until there is room for one request.
        """
        async with self._isolating:
            self._withheld = self.streams.withheld = True
            try:
                others_end = time.monotonic() + OTHERS_END_S
                while self._open_calls() and (time.monotonic() < others_end or not self._free()):
                    await asyncio.sleep(0.002)
                yield
            finally:
                self._withheld = False
                self.streams.go_on()
                self._wake()

    def call_alone(self, item: QueuedRequest) -> asyncio.Task[None] | None:
        """Begin a request within :meth:`alone`; None: nobody waits for it any more, it is settled."""
        assert self._model is not None
        if not (group := self._live([item])):
            return None
        SUSPECTS.inc()
        if self.streams.limit and item.request.flags & envelope.STREAM:
            return self.streams.begin(self._model, item)
        return self._begin_call(self._model, group)

    def add(self, item: QueuedRequest) -> None:
        """Take a request in."""
        if self.streams.limit and item.request.flags & envelope.STREAM:
            self.streams.add(item)
            return
        self.backlog.add(item)
        self._wake()

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
        if self._jobs is not None:
            self._jobs.cancel(ids)

    def forget(self) -> None:
        """Forget what waits: its channel has ended and the broker delivers it again."""
        self.backlog.clear()
        self.streams.clear()

    def _wake(self) -> None:
        """Something has changed: look, at the end of this turn of the event loop, what can begin."""
        if self._working and not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        self._due = False
        if not self._working or self._withheld:
            return
        while (model := self._model) is not None and len(self.backlog) and self._room() and self._free():
            if self._in_company():
                return
            group = self._live(self.backlog.take(min(self._max_rows, self._free())))
            if group:
                self._begin_call(model, group)
        if self._jobs is not None:
            self._jobs.begin(self._room(), job_calls(self.in_flight), self._free())

    def _begin_call(self, model: Model, group: list[QueuedRequest]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._call(model, group))
        self._calls[task] = group
        task.add_done_callback(self._called)
        return task

    def _room(self) -> int:
        """Calls that may be opened now. Whoever waits for an answer goes first; jobs take what is left."""
        return max(0, self.in_flight - len(self._calls) - (self._jobs.calling if self._jobs else 0))

    def _free(self) -> int:
        """Requests that calls may take now, so that no more are in calls than the Deployment allows."""
        if self._max_concurrency is None:
            return sys.maxsize
        held = sum(map(len, self._calls.values())) + (self._jobs.in_calls if self._jobs else 0)
        return max(0, self._max_concurrency - held)

    def _called(self, task: asyncio.Task[None]) -> None:
        group = self._calls.pop(task)
        self._wake()
        withdrawn = task in self._withdrawn
        self._withdrawn.discard(task)
        if task.cancelled():
            if withdrawn:  # else the worker stops: unsettled, it goes back to the queue
                self._settle(group)
        elif (error := task.exception()) is not None:
            # Unsettled: the broker delivers it again, as another attempt.
            log.error("a call ended unexpectedly", exc_info=error)

    def _in_company(self) -> bool:
        """Whether a call waits for company, if the Deployment asks for it: latency for fuller batches."""
        oldest = self.backlog.oldest() if self._window_s else None
        if oldest is None or oldest.request.rows == 0 or self.backlog.rows_at_head() >= self._max_rows:
            return False
        left = oldest.received + self._window_s - time.monotonic()
        if left > 0:
            if self._window_ends is not None:
                self._window_ends.cancel()  # it may be another's, who was due later
            self._window_ends = asyncio.get_running_loop().call_later(left, self._wake)
        return left > 0

    def _live(self, group: list[QueuedRequest]) -> list[QueuedRequest]:
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

    async def _call(self, model: Model, group: list[QueuedRequest]) -> None:
        started = time.monotonic()
        self.stats.open_calls.add(len(self._calls) + (self._jobs.calling if self._jobs else 0))
        timeout_s = max(max(item.request.deadline_ms for item in group) / 1e3 - time.time(), 0.001)
        try:
            answer = await model.call([item.request for item in group], timeout_s)
            spent = time.monotonic() - started
            frames = answers(group, answer, started, spent)
        except (BadRequest, ModelFailed, PayloadTooLarge, RowMismatch, envelope.Undecodable) as error:
            await self._on_model_error(model, group, error)
            return
        except DeadlinePassed:
            self._count("expired", group)
            self._settle(group)
            return
        except Unavailable:
            # Triton is gone in the middle of a call: any of these may be what killed it.
            self._lose(model)
            for item in group:
                note(logging.WARNING, "request lost its model server", item.request, shared=len(group))
            await self._publisher.again(group, alone=self._died_alone and len(group) == 1)
            self._settle(group)
            return
        except Exception as error:
            # Nobody thought of it. Its caller is told: unsettled, it would hold a place here for ever.
            ids = [telemetry.shown_id(item.request.trace) for item in group[:16]]
            log.exception("a call failed unexpectedly", extra={"request_ids": ids})
            await self._on_model_error(model, group, ModelFailed(f"the request could not be run: {error!r}"))
            return
        # Whoever waits goes first, but it is measured before the broker confirms what it has to confirm.
        rest = self._reply(group, frames)
        measure(self.stats, group, started, spent)
        self._count("ok", group)
        if rest:
            await self._reply_by_outbox(group, rest)

    async def _on_model_error(self, model: Model, group: list[QueuedRequest], error: Exception) -> None:
        """A bad request must not fail its neighbours."""
        over, again = divided(group)
        told = as_told(error, len(group))
        for item in over:
            await self._tell(item, failed(item.request, told))
        for item in again:
            if self._model is not model:  # one of them before it took the server along
                self.add(item)
            elif self._live([item]):
                await self._call(model, [item])

    async def _tell(self, item: QueuedRequest, error: TidegateError) -> None:
        request = item.request
        self.stats.failed += 1
        self.stats.tally.failed(1, time.monotonic() - item.received)
        self._count(error.reason, [item])
        frame = envelope.failure_frame(request.id, request.attempt, error.reason, error.message)
        if rest := self._reply([item], [frame], answered=False):
            await self._reply_by_outbox([item], rest)

    def _reply(
        self, group: list[QueuedRequest], frames: Sequence[Buffer | Reply], *, answered: bool = True
    ) -> Mapping[str, Sequence[Buffer | Reply]]:
        """Answer a group at once; gives the frames, by gateway, if that is for the outbox."""
        by_gateway: dict[str, list[Buffer | Reply]] = defaultdict(list)
        for item, frame in zip(group, frames, strict=True):
            by_gateway[item.delivery.reply_to].append(frame)
            if answered and item.request.flags & envelope.STREAM:
                end = envelope.end_frame(item.request.id, item.request.attempt, 1)
                by_gateway[item.delivery.reply_to].append(end)
        return {} if self._answer(group, by_gateway) else by_gateway

    async def _reply_by_outbox(
        self, group: list[QueuedRequest], by_gateway: Mapping[str, Sequence[Buffer | Reply]]
    ) -> None:
        left_s = max(item.request.deadline_ms for item in group) / 1e3 - time.time()
        for reply_to, replies in by_gateway.items():
            await self._publisher.reply(reply_to, replies, left_s=left_s)
        self._settle(group)

    @staticmethod
    def _count(outcome: str, group: list[QueuedRequest]) -> None:
        ANSWERED.labels(outcome).inc(len(group))
