"""Consume the queue ``exceptions.v1`` of requests and jobs that were given up.

The caller of a request gets an error, if the caller is known. The requests and jobs are kept as dead letters.
Only the leader consumes, because routers on one state folder share the journal of dead letters.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

from services.router.application.dead_letters import DeadLetters
from services.router.domain.dead_letters import DeadLetter
from services.router.domain.exceptions import UNDECODABLE, caller_error, job_of
from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import EXCEPTIONS, JOBS_PREFIX, REPLIES_PREFIX
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import Finish, Take
from tidegate.kernel.protocol.tenant import caller_of
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import JobStore, StoreUnavailable

log = telemetry.logger(__name__)

# The wait in seconds before a message is requeued because the store is unavailable. It is also the wait
# before the journal is loaded again after an error.
RETRY_S = 1.0
# The token with which jobs are taken from the store. It never changes, so a redelivery continues the attempt
# of the first delivery instead of starting a new one.
TOKEN = b"exceptions"


class ExceptionConsumer:
    """The consumer of the queue of given-up requests and jobs. It consumes only while this router leads."""

    def __init__(
        self,
        amqp_url: str,
        jobs: JobStore,
        letters: DeadLetters,
        leads: Callable[[], bool] = lambda: True,
    ) -> None:
        self._jobs = jobs
        self._letters = letters
        self._leads = leads
        self._consumes = False
        self._loop = RepeatingTask("exceptions", self._step)
        self.out = Connection(amqp_url, "router-out", self._no_setup)
        self.connection = Connection(amqp_url, "router-exceptions", self._on_setup)

    def start(self) -> None:
        """Connect to the broker. If this router leads, start to consume."""
        self._load_or_unload()
        self.out.start()
        self.connection.start()
        self._loop.start()

    def on_change(self) -> None:
        """Start to consume if this router has become the leader; stop if it is no longer the leader."""
        self._loop.wake()

    async def _step(self) -> float | None:
        if self._leads() == self._consumes:
            return None
        await self.connection.stop()  # the broker delivers unacked messages to the next leader
        try:
            self._load_or_unload()
        except OSError as error:  # consume nothing until the journal is loaded
            log.error(
                "the journal of dead letters cannot be loaded; trying again", extra={"problem": str(error)}
            )
            self._consumes = False
            return RETRY_S
        self.connection.start()
        return None

    def _load_or_unload(self) -> None:
        self._consumes = self._leads()
        if self._consumes:
            self._letters.load()
        else:
            self._letters.unload()

    async def stop(self) -> None:
        """Disconnect. Unsettled messages stay in the queue."""
        await self._loop.stop()
        await self.connection.stop()
        await self.out.stop()

    async def _no_setup(self, _: Channel) -> None:
        return

    async def _on_setup(self, channel: Channel) -> None:
        async def on_delivery(delivery: Delivery) -> None:
            try:
                await self._handle(delivery)
            except StoreUnavailable:
                await asyncio.sleep(RETRY_S)
                with contextlib.suppress(Unavailable):
                    channel.nack(delivery.tag)
                return
            except Unavailable:
                return  # the message is unsettled, so the broker delivers it again on the next channel
            channel.ack(delivery.tag)

        await channel.declare(EXCEPTIONS)
        if not self._consumes:
            return
        await channel.consume(EXCEPTIONS, on_delivery, prefetch=32)

    async def _handle(self, delivery: Delivery) -> None:
        cause = str(delivery.headers.get("cause", "unknown"))
        queue = str(delivery.headers.get("queue", ""))
        if queue.startswith(JOBS_PREFIX):
            await self._handle_job(delivery, cause, queue)
            return
        try:
            requests = [envelope.read_request(f) for f in envelope.unpack(envelope.REQUESTS, delivery.body)]
        except envelope.Undecodable:
            letter = DeadLetter(time.time(), UNDECODABLE, queue, "", 0, len(delivery.body), "")
            await self._letters.add(letter, None, delivery.body)
            return
        error = caller_error(cause, str(delivery.headers.get("loss", "")))
        replies: list[envelope.Buffer] = []
        for request in requests:
            trace = telemetry.shown_id(request.trace)  # the request id that the caller knows
            letter = DeadLetter(
                time.time(), cause, queue, request.id.hex(), request.attempt, len(request.raw), trace
            )
            # Store the letter before the reply is sent. If the request's tensors are in the blob store, the
            # letter gets a copy of them. The gateway deletes the original tensors after the reply.
            await self._letters.add(replace(letter, tenant=caller_of(request.tenant)), request)
            if error is not None:
                replies.append(
                    envelope.failure_frame(request.id, request.attempt, error.reason, error.message)
                )
        # A message can name any queue in reply_to, but only gateways' reply queues may get replies.
        reply_to = delivery.reply_to or ""
        if replies and reply_to.startswith(REPLIES_PREFIX):
            out = await self.out.wait_up(10.0)
            await out.publish(envelope.pack(envelope.REPLIES, replies), routing_key=reply_to)

    async def _handle_job(self, delivery: Delivery, cause: str, queue: str) -> None:
        """Mark the job as failed in its record, and keep its message as a dead letter. Send no reply."""
        id_ = job_of(delivery.headers.get("job"), delivery.body)
        if id_ is not None:
            await self._fail(id_, cause)
        letter = DeadLetter(
            time.time(), cause, queue, "" if id_ is None else id_.hex(), 0, len(delivery.body), ""
        )
        request = None
        if cause != UNDECODABLE:
            with contextlib.suppress(ValueError):
                (frame,) = envelope.unpack(envelope.REQUESTS, delivery.body)
                request = envelope.read_request(frame)
        if request is not None:
            tenant, trace = caller_of(request.tenant), telemetry.shown_id(request.trace)
            letter = replace(letter, attempt=request.attempt, tenant=tenant, trace=trace)
        await self._letters.add(letter, request, delivery.body)

    async def _fail(self, id_: bytes, cause: str) -> None:
        # Take the job as a worker would, then mark it as failed. If the job has ended or is running, the
        # store does not give the job out. Then the job's record does not change.
        (taken,) = await self._jobs.take([Take(id_, "router", False, 0, TOKEN)])
        if taken.outcome == "run":
            error = {"reason": cause, "message": f"the job's message could not be handled: {cause}"}
            await self._jobs.finish([Finish(id_, taken.attempt, "failed", error=error)])
