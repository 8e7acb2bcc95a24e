"""What a worker publishes: replies, requests to be tried again alone, requests nobody may try again."""

from __future__ import annotations

import asyncio
import time

from services.worker.domain.attempts import GIVE_UP, next_step
from services.worker.domain.backlog import Item
from tidegate import telemetry
from tidegate.broker import Link, Session
from tidegate.errors import Unavailable
from tidegate.protocol import envelope
from tidegate.protocol.envelope import Buffer, Request
from tidegate.topology import EXCEPTIONS, Queue

log = telemetry.logger(__name__)

PATIENCE_S = 60.0


class Outbox:
    """The publishing link of a worker, apart from the consuming one."""

    def __init__(self, amqp_url: str, queue: Queue) -> None:
        self._queue = queue
        self.link = Link(amqp_url, "worker-out", self._on_setup)

    async def _on_setup(self, session: Session) -> None:
        await session.declare(self._queue)
        await session.declare(EXCEPTIONS)

    async def reply(self, reply_to: str, frames: list[Buffer]) -> None:
        """Send answers to one gateway process; returns when the broker has them.

        A gateway that has gone has no queue any more: then they are dropped, as nobody waits for them.
        """
        await self._publish(envelope.pack(envelope.REPLIES, frames), reply_to, reply_to=None)

    async def again(self, group: list[Item]) -> None:
        """Requests whose worker or model server was lost under them: each alone, as its next attempt."""
        for item in group:
            await self.retry(item.request, item.parcel.reply_to)

    async def retry(self, request: Request, reply_to: str) -> None:
        """Publish a request again as its next attempt, or to the exceptions when it has none left."""
        step = next_step(request.attempt, safe=bool(request.flags & envelope.RETRY_SAFE))
        body = envelope.pack(envelope.REQUESTS, [envelope.with_attempt(request.raw, request.attempt + 1)])
        if step in GIVE_UP:
            await self.give_up(body, step, reply_to)
            return
        left_ms = int(request.deadline_ms - time.time() * 1e3)
        if left_ms > 0:
            await self._publish(body, self._queue.name, reply_to=reply_to, expiration_ms=left_ms)

    async def give_up(self, body: Buffer, cause: str, reply_to: str | None) -> None:
        """Hand an envelope to the router, which answers for it."""
        headers = {"cause": cause, "queue": self._queue.name}
        await self._publish(bytes(body), EXCEPTIONS.name, reply_to=reply_to, headers=headers, persistent=True)

    async def _publish(
        self,
        body: bytes,
        routing_key: str,
        *,
        reply_to: str | None,
        expiration_ms: int | None = None,
        headers: dict[str, str] | None = None,
        persistent: bool = False,
    ) -> None:
        """Until the broker has it; after ``PATIENCE_S`` its caller has long been told 504 by its gateway."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            try:
                session = await self.link.wait_up(PATIENCE_S)
                await session.publish(
                    body,
                    routing_key=routing_key,
                    reply_to=reply_to,
                    expiration_ms=expiration_ms,
                    headers=headers,
                    persistent=persistent,
                )
                return
            except Unavailable as error:
                if time.monotonic() > give_up_at:
                    log.error("gave up on a message", extra={"queue": routing_key, "problem": error.message})
                    return
                await asyncio.sleep(0.05)
