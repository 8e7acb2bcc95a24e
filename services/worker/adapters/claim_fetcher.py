"""Fetch large tensors of requests from the blob store, before the requests enter the backlog."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from services.worker.adapters.metrics import ANSWERED
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.domain.backlog import QueuedRequest
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Request
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)

MAX_FETCHES = 4


class ClaimFetcher:
    """Fetch the tensors of requests from the blob store, in the background or directly.

    In the background, the tensors of at most ``MAX_FETCHES`` requests are fetched at the same time. All
    tensors that are fetched in the background use at most ``limit_bytes`` of memory. They are counted until
    their requests are settled. If the tensors of one request are larger than ``limit_bytes``, they are
    fetched only when no other tensors are counted. ``add``: called with each request that was fetched in the
    background. ``settle``: called with requests whose fetch failed or whose deadline passed.
    """

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
        self._slots = asyncio.Semaphore(MAX_FETCHES)
        self._held_bytes: dict[bytes, int] = {}
        self._released = asyncio.Event()
        self._tasks = TaskSet()

    def start(self, item: QueuedRequest) -> None:
        """Fetch a request's tensors in the background, then call the constructor's ``add``.

        If the blob store fails, reply with an error and settle the request. If the deadline passes, only
        settle the request.
        """
        self._tasks.start(self._fetch_and_add(item))

    def release(self, group: list[QueuedRequest]) -> None:
        """Stop counting the bytes of settled requests, so that other requests can be fetched."""
        if self._held_bytes:
            for item in group:
                self._held_bytes.pop(item.request.id, None)
            self._released.set()

    def clear(self) -> None:
        """Cancel all fetches, because the channel of their requests has ended.

        The broker delivers these requests again.
        """
        self._held_bytes.clear()
        self._tasks.cancel()

    async def stop(self) -> None:
        """Cancel all fetches and wait for their end. Their requests stay unsettled."""
        await self._tasks.end()

    async def _fetch_and_add(self, item: QueuedRequest) -> None:
        if await self.fetch(item, bounded=True):
            self._add(item)

    async def fetch(self, item: QueuedRequest, *, bounded: bool = False) -> bool:
        """Fetch a request's tensors from the blob store and put them into ``item.request``.

        Return True on success. On failure, settle the request and return False. ``bounded``: True to wait
        until fewer than ``MAX_FETCHES`` fetches run and the tensors fit into the ``limit_bytes`` of this
        ClaimFetcher.
        """
        request = item.request
        try:
            async with asyncio.timeout(max(request.deadline_ms / 1e3 - time.time(), 0.0)):
                data = await (self._redeem_bounded(request) if bounded else self._claims.redeem(request.data))
        except TimeoutError:
            ANSWERED.labels("expired").inc()
            self._settle([item])
        except Unavailable as error:
            log.warning("the tensors of a request cannot be fetched", extra={"problem": error.message})
            ANSWERED.labels(error.reason).inc()
            frame = envelope.failure_frame(request.id, request.attempt, error.reason, error.message)
            await self._publisher.reply(item.delivery.reply_to, [frame])
            self._settle([item])
        else:
            item.request = request._replace(data=data)
            return True
        return False

    async def _redeem_bounded(self, request: Request) -> list[Buffer]:
        async with self._slots:
            await self._reserve(request.id, self._claims.size(request.data))
            return await self._claims.redeem(request.data)

    async def _reserve(self, id_: bytes, size: int) -> None:
        while self._held_bytes and sum(self._held_bytes.values()) + size > self._limit_bytes:
            self._released.clear()
            await self._released.wait()
        self._held_bytes[id_] = size
