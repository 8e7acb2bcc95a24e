"""Run the requests of each sequence one after another, in the order of their arrival.

The model server keeps the state of a sequence. It may run requests of several sequences together. A request
never runs twice, because that would change the state twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from services.worker.adapters.metrics import SEQUENCES, SEQUENCES_LOST
from services.worker.domain.backlog import QueuedRequest
from services.worker.domain.sequence_table import KeptSequence, SequenceTable, key_of, with_model_id
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import BadRequest, DeadlinePassed, TidegateError
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.protocol.models import SequenceSpec
from tidegate.kernel.protocol.sequences import START_FLAG, SequenceMark, lost, not_started, read_mark
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)

MODEL_LOST = "the replica's model server has ended"
REPLY_LOST = "the connection to the broker was lost while the model ran a request"
# The worker forgets an idle sequence this many seconds later than the model server does.
IDLE_MARGIN_S = 0.25


class Calls(Protocol):
    """Interface through which :class:`SequenceScheduler` calls the model and answers with errors."""

    @property
    def serving(self) -> bool:
        """Return True if this worker runs requests now and has a model."""

    def call_in_sequence(self, item: QueuedRequest) -> asyncio.Task[None] | None:
        """Start the call of a request.

        Return None if there is no model. If the caller no longer waits, settle the request and return None.
        """

    async def refuse(self, item: QueuedRequest, error: TidegateError) -> None:
        """Answer a request with an error."""


class SequenceScheduler:
    """Runs the requests of each sequence in order.

    ``slots``: the number of sequences that this replica can keep at the same time. ``fetch`` fetches the
    tensors of a large request from the blob store. It returns False if it has answered the request with an
    error.
    """

    def __init__(
        self, spec: SequenceSpec, instances: int, calls: Calls, max_concurrency: int | None = None
    ) -> None:
        # A sequence has at most one open call. So the limit on sequences also keeps the number of open calls
        # within `max_concurrency`.
        self.slots = min(spec.slots * instances, max_concurrency or sys.maxsize)
        self._idle_s = spec.idle_ms / 1e3 + IDLE_MARGIN_S
        self._calls = calls
        self._table = SequenceTable()
        self._runs: dict[KeptSequence, asyncio.Task[None]] = {}
        self._timers: dict[KeptSequence, asyncio.TimerHandle] = {}
        self._serves = asyncio.Event()
        self._tasks = TaskSet()
        self.fetch: Callable[[QueuedRequest], Awaitable[bool]] = _nothing_to_fetch

    @property
    def kept(self) -> int:
        """Return how many sequences this replica keeps."""
        return len(self._table.kept)

    @property
    def waiting(self) -> int:
        """Return how many requests wait for an earlier request of their sequence."""
        return sum(len(sequence.waiting) for sequence in self._runs)

    async def stop(self) -> None:
        """Stop immediately. The requests stay unsettled."""
        for timer in self._timers.values():
            timer.cancel()
        await tasks.end(*self._runs.values())
        await self._tasks.end()

    def serve(self) -> None:
        """Start the requests that wait for a model. Call this when a model is loaded."""
        self._serves.set()

    def add(self, item: QueuedRequest, *, again: bool = False) -> None:
        """Run a request after the earlier requests of its sequence.

        ``again``: True if the broker delivers the request again, because the connection was lost.
        """
        try:
            key = envelope.read_call_key(item.request.key)
        except envelope.Undecodable as error:
            self._refuse(item, BadRequest(str(error)))
            return
        mark = read_mark(key.parameters)
        if mark is None:
            self._refuse(
                item, BadRequest("this request does not belong to a sequence: send the parameter sequence_id")
            )
            return
        sequence_key = key_of(item.request, mark)
        kept = self._table.kept.get(sequence_key)
        if again and (self._table.has_begun(item.request.id) or _has_in_hand(kept, item)):
            self._take_over(item, kept, mark)
            return
        if kept is None and not mark.start:
            why = self._table.why_lost(sequence_key)
            model = sequence_key.endpoint
            self._refuse(item, lost(mark, model, why) if why else not_started(mark, model))
            return
        sequence = self._table.open(sequence_key)
        item.request = with_model_id(item.request, key, sequence.model_id)
        item.sequence = sequence
        sequence.waiting.append(item)
        self._run(sequence)

    def lose(self) -> None:
        """Forget all sequences, because the model server has ended and their state is gone."""
        self._serves.clear()
        for sequence in self._table.lose(MODEL_LOST):
            SEQUENCES_LOST.inc()
            if (timer := self._timers.pop(sequence, None)) is not None:
                timer.cancel()
            while sequence.waiting:
                self._refuse_lost(sequence.waiting.popleft())
        SEQUENCES.set(0)

    def discard_waiting(self) -> None:
        """Discard the waiting requests, because their channel has ended. The broker delivers them again."""
        for sequence in self._table.kept.values():
            sequence.waiting.clear()

    # --- run -------------------------------------------------------------------------------------------

    def _run(self, sequence: KeptSequence) -> None:
        if (timer := self._timers.pop(sequence, None)) is not None:
            timer.cancel()
        if sequence not in self._runs:
            run = self._runs[sequence] = asyncio.create_task(self._run_in_order(sequence), name="sequence")
            run.add_done_callback(lambda _: self._on_run_done(sequence))
        SEQUENCES.set(self.kept)

    def _on_run_done(self, sequence: KeptSequence) -> None:
        self._runs.pop(sequence, None)
        if sequence.waiting and not sequence.lost:
            self._run(sequence)
        elif self._table.kept.get(sequence.key) is sequence:
            self._timers[sequence] = asyncio.get_running_loop().call_later(
                self._idle_s, self._close, sequence
            )
        SEQUENCES.set(self.kept)

    async def _run_in_order(self, sequence: KeptSequence) -> None:
        while sequence.waiting:
            item = sequence.current = sequence.waiting.popleft()
            try:
                has_ended = await self._run_one(sequence, item)
            finally:
                sequence.current = None
            if has_ended and not sequence.lost:
                self._close(sequence)
                if sequence.waiting:  # more requests with this sequence id arrived before the answer
                    self._continue(sequence)
                    return

    async def _run_one(self, sequence: KeptSequence, item: QueuedRequest) -> bool:
        """Run a request, or answer it with an error. Return True if its sequence has ended."""
        if item.request.flags & envelope.CLAIM and not await self.fetch(item):
            return False
        mark = read_mark(envelope.read_call_key(item.request.key).parameters)
        assert mark is not None
        if not await self._wait_for_model(item):
            await self._calls.refuse(item, DeadlinePassed("the deadline passed before the model was ready"))
            return False
        if sequence.lost:  # the model server ended while this request waited
            self._refuse_lost(item)
            return False
        sequence.error = None
        call = self._calls.call_in_sequence(item)
        if call is None:
            return False
        self._table.begin(item.request.id)
        await asyncio.wait({call})
        return self._has_ended(sequence, mark)

    async def _wait_for_model(self, item: QueuedRequest) -> bool:
        """Wait until a model is loaded. Return False if the request's deadline passes before that."""
        while not self._calls.serving:
            left_s = item.request.deadline_ms / 1e3 - time.time()
            if left_s <= 0:
                return False
            self._serves.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._serves.wait()
        return True

    @staticmethod
    def _has_ended(sequence: KeptSequence, mark: SequenceMark) -> bool:
        error = sequence.error
        if error is None:
            return mark.end
        refused = isinstance(error, BadRequest)
        return refused and (mark.start or START_FLAG in error.message)

    def _continue(self, ended: KeptSequence) -> None:
        """Begin a new sequence with the requests that arrived after the last request of ``ended``."""
        sequence = self._table.open(ended.key)
        while ended.waiting:
            item = ended.waiting.popleft()
            key = envelope.read_call_key(item.request.key)
            item.request = with_model_id(item.request, key, sequence.model_id)
            item.sequence = sequence
            sequence.waiting.append(item)
        self._run(sequence)

    def _close(self, sequence: KeptSequence) -> None:
        self._timers.pop(sequence, None)
        self._table.close(sequence)
        SEQUENCES.set(self.kept)

    # --- refuse ----------------------------------------------------------------------------------------

    def _take_over(self, item: QueuedRequest, kept: KeptSequence | None, mark: SequenceMark) -> None:
        """Handle a redelivered request that was already here before the connection was lost.

        If the model runs the request now or will run it next, do not queue it again. Its result then settles
        the new delivery. Otherwise answer the request with an error, because a second call would change the
        state of the sequence twice.
        """
        current = kept.current if kept is not None else None
        if current is not None and current.request.id == item.request.id:
            current.delivery = item.delivery
            return
        # If the gateway has the answer already, it ignores this error.
        self._refuse(item, lost(mark, key_of(item.request, mark).endpoint, REPLY_LOST))

    def _refuse_lost(self, item: QueuedRequest) -> None:
        mark = read_mark(envelope.read_call_key(item.request.key).parameters)
        if mark is not None:
            self._refuse(item, lost(mark, key_of(item.request, mark).endpoint, MODEL_LOST))

    def _refuse(self, item: QueuedRequest, error: TidegateError) -> None:
        self._tasks.start(self._calls.refuse(item, error), "refuse a request of a sequence")


def sequence_scheduler(
    spec: SequenceSpec | None, instances: int, calls: Calls, max_concurrency: int | None
) -> SequenceScheduler | None:
    """Return the scheduler of a model's sequences; None if the model is not stateful."""
    return SequenceScheduler(spec, instances, calls, max_concurrency) if spec is not None else None


def lost_in_call(request: Request, error: TidegateError) -> TidegateError:
    """Return the error for a request whose model server was lost during the call.

    For a request of a sequence, this error says that the sequence is lost. For any other request, it is
    ``error``.
    """
    mark = read_mark(envelope.read_call_key(request.key).parameters)
    return error if mark is None else lost(mark, key_of(request, mark).endpoint, MODEL_LOST)


def _has_in_hand(sequence: KeptSequence | None, item: QueuedRequest) -> bool:
    """Return True if this request is the current request of a sequence."""
    current = sequence.current if sequence is not None else None
    return current is not None and current.request.id == item.request.id


async def _nothing_to_fetch(_: QueuedRequest) -> bool:
    return True
