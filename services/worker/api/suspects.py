"""Requests that were lost with a worker or a model server: run one at a time, with nothing beside them.

The queue of suspects is read only while nothing else is in the model, one message at a time, and each runs at
once. So a message that comes redelivered was alone in the model when its worker died, and is charged for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.domain.backlog import QueuedRequest
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Delivery
from tidegate.kernel.broker.topology import Queue, suspects_queue
from tidegate.kernel.errors import Unavailable

if TYPE_CHECKING:
    from services.worker.application.batch_scheduler import BatchScheduler

log = telemetry.logger(__name__)

# How often a worker looks for suspects that another one has published.
LOOK_S = 1.0
# After so long other requests get as much time as the suspects had.
TURN_S = 2.0
# How long nothing else is begun beside a suspect that runs. What kills, kills soon.
HOLD_S = 5.0
EMPTY_S = 0.05


class Door(Protocol):
    """Reads and settles the deliveries of suspects."""

    @property
    def isolating(self) -> tuple[Channel, BatchScheduler] | None:
        """Return what suspects are run with; None while no request may be taken."""

    async def consume_alone(self, channel: Channel, queue: Queue, take: Callable[[Delivery], None]) -> str:
        """Consume a queue one message at a time; return the consumer's tag."""

    async def take_alone(self, channel: Channel, delivery: Delivery) -> QueuedRequest | None:
        """Return the request of a delivery; None: it is settled, and not to be run."""

    async def put_back(self, item: QueuedRequest) -> None:
        """Publish a suspect again that was not run."""


class SuspectConsumer:
    """Looks for suspects of a Deployment and runs them."""

    def __init__(self, queue: Queue, publisher: ReplyPublisher, door: Door) -> None:
        self._queue = suspects_queue(queue)
        self._publisher = publisher
        self._door = door
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="suspects")

    async def stop(self) -> None:
        """End; what runs stays unsettled."""
        await tasks.end(self._task)

    async def _run(self) -> None:
        # A worker that has just begun takes at once what the one before it has left.
        sure = True
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._publisher.suspected.wait(), LOOK_S)
                sure = True
            self._publisher.suspected.clear()
            try:
                sure = await self._look(sure=sure)
            except Unavailable as error:
                log.info("suspects wait for the broker", extra={"problem": error.message})
            except Exception:
                log.exception("suspects were not run; the next look tries again")

    async def _look(self, *, sure: bool) -> bool:
        """Run what is there, by turns with everything else; return whether the next look is to be ``sure``.

        Those of another worker are left to it unless they are still there at the next look: to isolate a call
        costs every worker that does it a pause.
        """
        while (found := self._door.isolating) is not None:
            channel, scheduler = found
            if not scheduler.serving or channel.blocked:
                return sure
            if not await channel.depth(self._queue):
                return False
            if not sure:
                return True
            began = time.monotonic()
            async with scheduler.alone():
                running = await self._turn(channel, scheduler)
            if running is not None:
                await asyncio.wait({running})
            await asyncio.sleep(min(time.monotonic() - began, TURN_S))
        return sure

    async def _turn(self, channel: Channel, scheduler: BatchScheduler) -> asyncio.Task[None] | None:
        """Run suspects until there are none, or time is up; return the call that has not ended by then."""
        arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        ends_at = time.monotonic() + TURN_S
        running = None
        consumer = await self._door.consume_alone(channel, self._queue, arrived.put_nowait)
        while running is None and time.monotonic() < ends_at and self._goes_on(channel, scheduler):
            try:
                delivery = await asyncio.wait_for(arrived.get(), EMPTY_S)
            except TimeoutError:
                if not await channel.depth(self._queue):
                    break
            else:
                running = await self._run_one(channel, scheduler, delivery)
        await channel.cancel(consumer)
        # One more may have come meanwhile. It has not run, so it must not look as if it had.
        while not arrived.empty():
            item = await self._door.take_alone(channel, arrived.get_nowait())
            if item is not None:
                await self._door.put_back(item)
        return running

    async def _run_one(
        self, channel: Channel, scheduler: BatchScheduler, delivery: Delivery
    ) -> asyncio.Task[None] | None:
        """Run one; return its call if that goes on for longer than everything else can be held up."""
        item = await self._door.take_alone(channel, delivery)
        if item is None:
            return None
        if not scheduler.serving:
            await self._door.put_back(item)
            return None
        call = scheduler.call_alone(item)
        if call is not None:
            await asyncio.wait({call}, timeout=HOLD_S)
        return call if call is not None and not call.done() else None

    def _goes_on(self, channel: Channel, scheduler: BatchScheduler) -> bool:
        return self._door.isolating == (channel, scheduler) and scheduler.serving
