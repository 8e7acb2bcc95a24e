"""Run suspects, each alone in the model.

Suspects are requests that were lost with a worker or a model server.

Before a worker reads the queue of suspects, it waits until the model runs nothing else. After a few seconds,
it waits only until the Deployment's ``max_concurrency`` allows one more request. It reads one message at a
time, and runs the request of this message immediately. If such a message is redelivered, a worker died while
it ran this request, so the request counts as the cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Protocol

from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.application.batch_scheduler import BatchScheduler
from services.worker.domain.backlog import QueuedRequest
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Delivery
from tidegate.kernel.broker.topology import Queue, suspects_queue
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

# Seconds between two checks for suspects that other workers have published.
LOOK_S = 1.0
# In a turn of suspects, no suspect starts after this many seconds. Then the other requests have a turn. It is
# as long as the turn of the suspects was, but at most this many seconds.
TURN_S = 2.0
# While a suspect runs, other calls wait for it, but at most for this many seconds. A suspect that kills its
# worker usually does so earlier.
HOLD_S = 5.0
EMPTY_S = 0.05


class SuspectDeliveries(Protocol):
    """Read and settle the deliveries of suspects."""

    @property
    def accepting(self) -> tuple[Channel, BatchScheduler] | None:
        """Return the channel and the scheduler to run suspects with, or None while no request may start."""

    async def consume_single(self, channel: Channel, queue: Queue, take: Callable[[Delivery], None]) -> str:
        """Consume a queue one message at a time; return the consumer's tag."""

    async def read_suspect(self, channel: Channel, delivery: Delivery) -> QueuedRequest | None:
        """Return the request of a delivery, with its tensors; None if it must not run."""

    async def requeue_suspect(self, item: QueuedRequest) -> None:
        """Publish an unchanged copy of a suspect that has not run."""


class SuspectConsumer:
    """Look for suspects of a Deployment and run them."""

    def __init__(self, queue: Queue, publisher: ReplyPublisher, deliveries: SuspectDeliveries) -> None:
        self._queue = suspects_queue(queue)
        self._publisher = publisher
        self._deliveries = deliveries
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to look for suspects."""
        self._task = asyncio.create_task(self._run(), name="suspects")

    async def stop(self) -> None:
        """Stop. If a suspect runs, its message stays unsettled."""
        await tasks.end(self._task)

    async def _run(self) -> None:
        # At its start, a worker looks for suspects that are already in the queue and runs them immediately.
        at_once = True
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._publisher.suspected.wait(), LOOK_S)
                at_once = True
            self._publisher.suspected.clear()
            try:
                at_once = await self._look(at_once=at_once)
            except Unavailable as error:
                log.info("suspects wait until the broker is available", extra={"problem": error.message})
            except Exception:
                log.exception("suspects could not be run; the worker tries again")

    async def _look(self, *, at_once: bool) -> bool:
        """Run the suspects in the queue, in turns with other requests.

        If ``at_once`` is False, only check whether the queue has suspects. The worker that published them
        usually runs them before the next check. So the other workers need not pause their calls. Return the
        value of ``at_once`` for the next check.
        """
        while (accepting := self._deliveries.accepting) is not None:
            channel, scheduler = accepting
            if not scheduler.serving or channel.blocked:
                return at_once
            if not await channel.depth(self._queue):
                return False
            if not at_once:
                return True
            began = time.monotonic()
            async with scheduler.alone():
                running = await self._run_turn(channel, scheduler)
            if running is not None:
                await asyncio.wait({running})
            await asyncio.sleep(min(time.monotonic() - began, TURN_S))
        return at_once

    async def _run_turn(self, channel: Channel, scheduler: BatchScheduler) -> asyncio.Task[None] | None:
        """Run suspects until none is left or the turn is over.

        Return the last call if it still runs, else None.
        """
        arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        ends_at = time.monotonic() + TURN_S
        running = None
        consumer = await self._deliveries.consume_single(channel, self._queue, arrived.put_nowait)
        while running is None and time.monotonic() < ends_at and self._may_run(channel, scheduler):
            try:
                delivery = await asyncio.wait_for(arrived.get(), EMPTY_S)
            except TimeoutError:
                if not await channel.depth(self._queue):
                    break
            else:
                running = await self._run_one(channel, scheduler, delivery)
        await channel.cancel(consumer)
        # One more suspect may have arrived that has not run. Publish it again. If its message stayed
        # unsettled, the redelivery would count as a loss.
        while not arrived.empty():
            item = await self._deliveries.read_suspect(channel, arrived.get_nowait())
            if item is not None:
                await self._deliveries.requeue_suspect(item)
        return running

    async def _run_one(
        self, channel: Channel, scheduler: BatchScheduler, delivery: Delivery
    ) -> asyncio.Task[None] | None:
        """Start a suspect, and wait at most ``HOLD_S`` seconds for its end.

        If the call still runs after that, return it; else return None.
        """
        item = await self._deliveries.read_suspect(channel, delivery)
        if item is None:
            return None
        if not scheduler.serving:
            await self._deliveries.requeue_suspect(item)
            return None
        call = scheduler.call_alone(item)
        if call is not None:
            await asyncio.wait({call}, timeout=HOLD_S)
        return call if call is not None and not call.done() else None

    def _may_run(self, channel: Channel, scheduler: BatchScheduler) -> bool:
        return self._deliveries.accepting == (channel, scheduler) and scheduler.serving
