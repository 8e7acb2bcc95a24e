"""What a worker publishes with confirms: large replies, and others that cannot go beside their acks;
requests to be tried again with nothing beside them; requests nobody may try again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from services.worker.adapters.request_log import note
from services.worker.domain.attempts import GIVE_UP, after_loss
from services.worker.domain.backlog import QueuedRequest
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import EXCEPTIONS, WORKERS, Queue, suspects_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply, Request

log = telemetry.logger(__name__)

PATIENCE_S = 60.0


class ReplyPublisher:
    """The link of a worker that only publishes, with confirms.

    ``suspected`` is set when it has published a request that is to run alone. ``loss`` says how the model
    last ended, for the callers of requests that are given up.
    """

    def __init__(self, amqp_url: str, queue: Queue, claims: Claims) -> None:
        self._queue = queue
        self._suspects = suspects_queue(queue)
        self._claims = claims
        self.suspected = asyncio.Event()
        self.loss = ""
        self.connection = Connection(amqp_url, "worker-out", self._on_setup)

    async def _on_setup(self, channel: Channel) -> None:
        await channel.find(WORKERS)

    async def reply(
        self, reply_to: str, frames: Sequence[Buffer | Reply], *, left_s: float = PATIENCE_S
    ) -> None:
        """Send answers to one gateway process; returns when the broker has them.

        Large ones may be given unframed: their data is not copied then. ``left_s``: how long anybody waits
        for them. A gateway that has gone has no queue any more: then they are dropped.
        """
        small: list[Buffer] = []
        for frame in frames:
            if not isinstance(frame, Reply) and len(frame) <= envelope.LARGE:
                small.append(frame)
                continue
            reply = frame if isinstance(frame, Reply) else envelope.read_reply(frame)
            await self._publish(await self._alone(reply, left_s), reply_to, reply_to=None)
        for start, end in envelope.runs([len(frame) for frame in small]):
            await self._publish(envelope.pack(envelope.REPLIES, small[start:end]), reply_to, reply_to=None)

    async def _alone(self, reply: Reply, left_s: float) -> bytes | list[Buffer]:
        """A large reply as an envelope of its own; by claim when it is too large for a message."""
        if self._claims.needed(sum(map(len, reply.data))):
            try:
                claim = await self._claims.give(reply.data, left_s)
            except Unavailable as error:
                frame = envelope.failure_frame(reply.id, reply.attempt, error.reason, error.message)
                return envelope.pack(envelope.REPLIES, [frame])
            reply = reply._replace(data=[claim], claimed=True)
        return envelope.pack_alone(envelope.REPLIES, envelope.reply_pieces(reply))

    async def again(self, group: list[QueuedRequest], *, alone: bool) -> None:
        """Publish requests again whose model server was lost under them; ``alone`` as for :meth:`retry`."""
        for item in group:
            await self.retry(item.request, item.delivery.reply_to, alone=alone)

    async def retry(self, request: Request, reply_to: str, *, alone: bool) -> None:
        """Publish a lost request as a suspect, or to the exceptions when it has no attempt left.

        ``alone``: nothing else was in the model, so the loss is charged to it.
        """
        safe = bool(request.flags & envelope.RETRY_SAFE)
        step, attempt = after_loss(request.attempt, alone=alone, safe=safe)
        given_up = step in GIVE_UP
        what = "request is given up" if given_up else "request is tried again, alone"
        note(logging.WARNING, what, request, cause=step, attempt=attempt, was_alone=alone)
        if given_up:
            body = envelope.pack(envelope.REQUESTS, [envelope.with_attempt(request.raw, attempt)])
            await self.give_up(body, step, reply_to, loss=self.loss)
        else:
            await self.suspect(request, attempt, reply_to)

    async def suspect(self, request: Request, attempt: int, reply_to: str) -> None:
        """Publish a request that is to run with nothing beside it, as this attempt."""
        if await self._enqueue(self._suspects, request, attempt, reply_to):
            self.suspected.set()
        elif request.flags & envelope.STREAM:
            # Only one that has emitted outlives its deadline, and such a one is not begun again.
            lost = "the worker was lost in the middle of the stream"
            frame = envelope.failure_frame(request.id, request.attempt, Unavailable.reason, lost)
            await self.reply(reply_to, [frame])

    async def put_back(self, request: Request, reply_to: str) -> None:
        """Publish a request again that was in no call, unchanged, for any replica."""
        await self._enqueue(self._queue, request, request.attempt, reply_to)

    async def _enqueue(self, queue: Queue, request: Request, attempt: int, reply_to: str) -> bool:
        """Publish a request as this attempt; False: nobody waits for it any more."""
        left_ms = int(request.deadline_ms - time.time() * 1e3)
        if left_ms <= 0:
            return False
        await self._publish(
            envelope.pack(envelope.REQUESTS, [envelope.with_attempt(request.raw, attempt)]),
            queue.name,
            reply_to=reply_to,
            expiration_ms=left_ms,
            mandatory=True,
            patience_s=min(left_ms / 1e3, PATIENCE_S),
        )
        return True

    async def give_up(
        self, body: Buffer, cause: str, reply_to: str | None, *, queue: str | None = None, loss: str = ""
    ) -> None:
        """Hand an envelope to the router, which answers for it. ``queue``: whence, if not the requests'.

        ``loss`` says what ended under it.
        """
        headers = {"cause": cause, "queue": queue or self._queue.name, **({"loss": loss} if loss else {})}
        await self._publish(
            bytes(body),
            EXCEPTIONS.name,
            reply_to=reply_to,
            headers=headers,
            persistent=True,
            mandatory=True,
        )

    async def _publish(
        self,
        body: bytes | list[Buffer],
        routing_key: str,
        *,
        reply_to: str | None,
        expiration_ms: int | None = None,
        headers: dict[str, str] | None = None,
        persistent: bool = False,
        mandatory: bool = False,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Until the broker has it; after ``patience_s`` its caller has long been told 504 by its gateway.

        ``mandatory``: until a queue has it, which another service may still have to declare.
        """
        give_up_at = time.monotonic() + patience_s
        while True:
            try:
                channel = await self.connection.wait_up(patience_s)
                await channel.publish(
                    body,
                    exchange=WORKERS.name,
                    routing_key=routing_key,
                    reply_to=reply_to,
                    expiration_ms=expiration_ms,
                    headers=headers,
                    persistent=persistent,
                    mandatory=mandatory,
                )
                return
            except Unavailable as error:
                if time.monotonic() > give_up_at:
                    log.error("gave up on a message", extra={"queue": routing_key, "problem": error.message})
                    return
                await asyncio.sleep(0.05)
