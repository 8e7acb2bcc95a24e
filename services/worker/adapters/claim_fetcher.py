"""Requests whose tensors are in the blob store: fetched before they enter the backlog, with a bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from services.worker.adapters.metrics import ANSWERED
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.domain.backlog import QueuedRequest
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Request

log = telemetry.logger(__name__)

AT_ONCE = 4


class ClaimFetcher:
    """Fetches concurrently, ``limit_bytes`` in hand at most; a single larger request is let through alone."""

    def __init__(
        self,
        claims: Claims,
        publisher: ReplyPublisher,
        limit_bytes: int,
        add: Callable[[QueuedRequest], None],
        settle: Callable[[list[QueuedRequest]], None],
    ) -> None:
        self._claims = claims
        self._publisher = publisher
        self._limit_bytes = limit_bytes
        self._add = add
        self._settle = settle
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._held: dict[bytes, int] = {}
        self._room = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, item: QueuedRequest) -> None:
        """Fetch what the request's claim stands for, then hand it on; what cannot be had is answered."""
        task = asyncio.create_task(self._redeem(item))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def settled(self, group: list[QueuedRequest]) -> None:
        """These requests are done, and their tensors no longer in hand."""
        if self._held:
            for item in group:
                self._held.pop(item.request.id, None)
            self._room.set()

    def clear(self) -> None:
        """Give up what is being fetched: its channel has ended and the broker delivers it again."""
        self._held.clear()
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """End; what was being fetched stays unsettled."""
        await tasks.end(*self._tasks)

    async def _redeem(self, item: QueuedRequest) -> None:
        if await self.fetch(item, wait=True):
            self._add(item)

    async def fetch(self, item: QueuedRequest, *, wait: bool = False) -> bool:
        """Fetch the tensors of a request's claim into it; False: they cannot be had, and it is settled.

        ``wait``: only once there is room for them.
        """
        request = item.request
        try:
            async with asyncio.timeout(max(request.deadline_ms / 1e3 - time.time(), 0.0)):
                data = await (self._in_turn(request) if wait else self._claims.redeem(request.data))
        except TimeoutError:
            ANSWERED.labels("expired").inc()
            self._settle([item])
        except Unavailable as error:
            log.warning("a claim was not redeemed", extra={"problem": error.message})
            ANSWERED.labels(error.reason).inc()
            frame = envelope.failure_frame(request.id, request.attempt, error.reason, error.message)
            await self._publisher.reply(item.delivery.reply_to, [frame])
            self._settle([item])
        else:
            item.request = request._replace(data=data)
            return True
        return False

    async def _in_turn(self, request: Request) -> list[Buffer]:
        async with self._slots:
            await self._wait_for_room(request.id, self._claims.size(request.data))
            return await self._claims.redeem(request.data)

    async def _wait_for_room(self, id_: bytes, size: int) -> None:
        while self._held and sum(self._held.values()) + size > self._limit_bytes:
            self._room.clear()
            await self._room.wait()
        self._held[id_] = size
