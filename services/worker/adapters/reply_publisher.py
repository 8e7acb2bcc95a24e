"""Publish replies, suspects, and requests that are given up, all with publisher confirms."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

from services.worker.adapters.request_log import log_request
from services.worker.domain.backlog import QueuedRequest
from services.worker.domain.retry_after_loss import GIVE_UP, after_loss
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.broker.connection import Channel, Connection, Unroutable
from tidegate.kernel.broker.topology import EXCEPTIONS, WORKERS, Queue, suspects_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply, Request

log = telemetry.logger(__name__)

# The longest time in seconds to try to publish a message. After it, the gateway has already answered the
# caller with 504.
PUBLISH_TIMEOUT_S = 60.0
RETRY_S = 0.05
# The broker deletes a gateway process's reply queue REPLIES_KEPT_S seconds after the process has ended. A
# process that only lost its connection declares its queue again. If the queue is still missing GONE_S seconds
# after it was found missing, the process counts as ended.
GONE_S = 10.0
# The longest pause in seconds between two tries to publish to a missing queue. Each try costs network
# traffic, because the broker returns the whole message.
LONGEST_RETRY_S = 1.0


class GatewayGone(Exception):
    """The error for replies to a gateway process that has ended. No caller waits for them."""


class ReplyPublisher:
    """A connection that only publishes, with publisher confirms.

    ``suspected``: set after a suspect was published. ``loss``: a text that says how the last call was lost.
    The caller of a request that is given up gets this text.
    """

    gone_s = GONE_S

    def __init__(self, amqp_url: str, queue: Queue, claims: Claims) -> None:
        self._queue = queue
        self._suspects = suspects_queue(queue)
        self._claims = claims
        self.suspected = asyncio.Event()
        self.loss = ""
        self.connection = Connection(amqp_url, "worker-out", self._on_setup, fast=True)

    async def _on_setup(self, channel: Channel) -> None:
        await channel.find(WORKERS)

    async def reply(
        self, reply_to: str, frames: Sequence[Buffer | Reply], *, left_s: float = PUBLISH_TIMEOUT_S
    ) -> None:
        """Publish replies to one gateway process, and wait for the broker's confirm.

        The calling code should pass a large reply as a Reply. A frame would need a copy of the reply's data.
        ``left_s``: the seconds for which the callers still wait. If the gateway process has ended, its queue
        does not exist, and the broker drops the replies.
        """
        await self._reply(reply_to, frames, left_s)

    async def send_chunks(
        self, reply_to: str, frames: Sequence[Buffer | Reply], *, left_s: float = PUBLISH_TIMEOUT_S
    ) -> None:
        """Publish parts of streams as :meth:`reply` does. Raise GatewayGone if the gateway process has ended.

        While the gateway reconnects, this method waits, so that the gateway gets each chunk.
        """
        await self._reply(reply_to, frames, left_s, gone_s=self.gone_s)

    async def _reply(
        self, reply_to: str, frames: Sequence[Buffer | Reply], left_s: float, gone_s: float | None = None
    ) -> None:
        publish = partial(self._publish, routing_key=reply_to, reply_to=None, gone_s=gone_s)
        small: list[Buffer] = []
        for frame in frames:
            if not isinstance(frame, Reply) and len(frame) <= envelope.LARGE:
                small.append(frame)
                continue
            reply = frame if isinstance(frame, Reply) else envelope.read_reply(frame)
            await publish(await self._pack_large(reply, left_s))
        for start, end in envelope.runs([len(frame) for frame in small]):
            await publish(envelope.pack(envelope.REPLIES, small[start:end]))

    async def _pack_large(self, reply: Reply, left_s: float) -> bytes | list[Buffer]:
        """Return an envelope with one large reply.

        If the data is too large for a message, it is put into the blob store, and the reply contains a claim.
        """
        if self._claims.needed(sum(map(len, reply.data))):
            try:
                claim = await self._claims.give(reply.data, left_s)
            except Unavailable as error:
                frame = envelope.failure_frame(reply.id, reply.attempt, error.reason, error.message)
                return envelope.pack(envelope.REPLIES, [frame])
            reply = reply._replace(data=[claim], claimed=True)
        return envelope.pack_alone(envelope.REPLIES, envelope.reply_pieces(reply))

    async def publish_lost(self, group: Sequence[QueuedRequest], *, alone: bool) -> None:
        """Publish the requests of a lost call again. :meth:`retry_or_give_up` explains ``alone``."""
        for item in group:
            await self.retry_or_give_up(item.request, item.delivery.reply_to, alone=alone)

    async def retry_or_give_up(self, request: Request, reply_to: str, *, alone: bool) -> None:
        """Publish a lost request as a suspect, or to the router if it must not run again.

        A request is lost if the model ended while the request ran. ``alone``: True if no other request was in
        the model. Then this request is the probable cause, and the loss counts against it. A copy for shadow
        traffic is dropped, because no caller waits for it.
        """
        if request.flags & envelope.COPY:
            log_request(logging.INFO, "a copy for shadow traffic is dropped", request, was_alone=alone)
            return
        safe = bool(request.flags & envelope.RETRY_SAFE)
        step, attempt = after_loss(request.attempt, alone=alone, safe=safe)
        given_up = step in GIVE_UP
        what = "request is given up" if given_up else "request is retried alone"
        log_request(logging.WARNING, what, request, cause=step, attempt=attempt, was_alone=alone)
        if given_up:
            body = envelope.pack(envelope.REQUESTS, [envelope.with_attempt(request.raw, attempt)])
            await self.publish_exception(body, step, reply_to, loss=self.loss)
        else:
            await self.publish_suspect(request, attempt, reply_to)

    async def publish_suspect(self, request: Request, attempt: int, reply_to: str) -> None:
        """Publish a request as a suspect with this attempt number. A suspect runs alone in the model."""
        if await self._publish_request(self._suspects, request, attempt, reply_to):
            self.suspected.set()
        elif request.flags & envelope.STREAM:
            # The deadline has passed. A stream that has sent an answer may run after its deadline, but it
            # cannot be retried. So its caller gets an error.
            message = "the worker ended in the middle of the stream"
            frame = envelope.failure_frame(request.id, request.attempt, Unavailable.reason, message)
            await self.reply(reply_to, [frame])

    async def requeue(
        self, request: Request, reply_to: str, queue: Queue | None = None, *, kept_ms: int = 0
    ) -> None:
        """Publish an unchanged request again, for any replica.

        The request must not have been in a call of the model. ``queue``: the queue to publish to; None for
        the Deployment's request queue. The message expires ``kept_ms`` milliseconds after the request's
        deadline.
        """
        await self._publish_request(queue or self._queue, request, request.attempt, reply_to, kept_ms)

    async def _publish_request(
        self, queue: Queue, request: Request, attempt: int, reply_to: str, kept_ms: int = 0
    ) -> bool:
        """Publish a request with this attempt number. Return False, without publishing, if it has expired."""
        left_ms = int(request.deadline_ms - time.time() * 1e3) + kept_ms
        if left_ms <= 0:
            return False
        await self._publish(
            envelope.pack(envelope.REQUESTS, [envelope.with_attempt(request.raw, attempt)]),
            queue.name,
            reply_to=reply_to,
            expiration_ms=left_ms,
            mandatory=True,
            timeout_s=min(left_ms / 1e3, PUBLISH_TIMEOUT_S),
        )
        return True

    async def publish_exception(
        self, body: Buffer, cause: str, reply_to: str | None, *, queue: str | None = None, loss: str = ""
    ) -> None:
        """Publish an envelope to the router, which answers the callers and stores dead letters.

        ``queue``: the name of the queue from which the envelope came; None for the queue of requests.
        ``loss``: a text about how the model ended.
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
        timeout_s: float = PUBLISH_TIMEOUT_S,
        gone_s: float | None = None,
    ) -> None:
        """Publish a message. Try again until the broker confirms it, for at most ``timeout_s`` seconds.

        A message that is not confirmed in time is logged and lost. ``mandatory``: True if the broker must
        also report a message that reaches no queue. Then that message is published again, because another
        service may declare the queue later. ``gone_s``: raise GatewayGone if the message reaches no queue for
        this many seconds.
        """
        give_up_at = time.monotonic() + timeout_s
        missing_since: float | None = None
        used: Channel | None = None
        pause_s = RETRY_S
        while True:
            try:
                channel = await self.connection.wait_up(timeout_s)
                if channel is not used:  # after a reconnect, gateways get time to declare their queues again
                    used, missing_since, pause_s = channel, None, RETRY_S
                await channel.publish(
                    body,
                    exchange=WORKERS.name,
                    routing_key=routing_key,
                    reply_to=reply_to,
                    expiration_ms=expiration_ms,
                    headers=headers,
                    persistent=persistent,
                    mandatory=mandatory or gone_s is not None,
                )
                return
            except Unavailable as error:
                now = time.monotonic()
                missing_since = (missing_since or now) if isinstance(error, Unroutable) else None
                if gone_s is not None and missing_since is not None and now - missing_since >= gone_s:
                    raise GatewayGone(routing_key) from error
                if now > give_up_at:
                    log.error(
                        "a message could not be published and is lost",
                        extra={"queue": routing_key, "problem": error.message},
                    )
                    return
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_RETRY_S) if missing_since is not None else RETRY_S
