"""The AMQP door: answers the callers of requests that no worker may take, and keeps the dead letters.

Only the router that leads consumes: routers on one state folder share the journal of the dead letters.
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
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import EXCEPTIONS, JOBS_PREFIX, REPLIES_PREFIX
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import Finish, Take
from tidegate.kernel.store import JobStore, StoreUnavailable

log = telemetry.logger(__name__)

# A job's message of which no record could be had goes back to its queue after this time.
AWAY_S = 1.0
# By this token a job is ours to fail however often its message comes, should an answer have been lost.
TOKEN = b"exceptions"


class ExceptionConsumer:
    """Consumer of the exceptions queue."""

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
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.out = Connection(amqp_url, "router-out", self._no_setup)
        self.connection = Connection(amqp_url, "router-exceptions", self._on_setup)

    def start(self) -> None:
        """Connect; consume while this router leads."""
        self._turn()
        self.out.start()
        self.connection.start()
        self._task = asyncio.create_task(self._follow(), name="exceptions")

    def on_change(self) -> None:
        """Begin or end to consume if this router has become the leader, or is it no longer."""
        self._changed.set()

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._leads() == self._consumes:
                continue
            await self.connection.stop()  # what is unsettled goes to the next leader
            try:
                self._turn()
            except OSError as error:  # a full disk, for one: without a consumer nobody would be answered
                log.error("the dead letters cannot be read; trying again", extra={"problem": str(error)})
                self._consumes = False
                await asyncio.sleep(AWAY_S)
                self._changed.set()
            else:
                self.connection.start()

    def _turn(self) -> None:
        self._consumes = self._leads()
        if self._consumes:
            self._letters.load()
        else:
            self._letters.unload()

    async def stop(self) -> None:
        """Disconnect; what is unsettled stays in the queue."""
        await tasks.end(self._task)
        await self.connection.stop()
        await self.out.stop()

    async def _no_setup(self, _: Channel) -> None:
        return

    async def _on_setup(self, channel: Channel) -> None:
        async def on_delivery(delivery: Delivery) -> None:
            try:
                await self._handle(delivery)
            except StoreUnavailable:
                await asyncio.sleep(AWAY_S)
                with contextlib.suppress(Unavailable):
                    channel.nack(delivery.tag)
                return
            except Unavailable:
                return  # unsettled: it comes again with the next channel
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
            await self._letters.bury(letter, None, delivery.body)
            return
        told = caller_error(cause, str(delivery.headers.get("loss", "")))
        replies: list[envelope.Buffer] = []
        for request in requests:
            trace = request.trace.decode("latin-1")  # as its caller got it back
            letter = DeadLetter(
                time.time(), cause, queue, request.id.hex(), request.attempt, len(request.raw), trace
            )
            # Before the answer: with it the gateway deletes the tensors that a claim stands for.
            await self._letters.bury(
                replace(letter, tenant=request.tenant.decode("utf-8", "replace")), request
            )
            if told is not None:
                replies.append(envelope.failure_frame(request.id, request.attempt, told.reason, told.message))
        # Only to a gateway: what a message names as the queue for its answer may be any queue.
        reply_to = delivery.reply_to or ""
        if replies and reply_to.startswith(REPLIES_PREFIX):
            out = await self.out.wait_up(10.0)
            await out.publish(envelope.pack(envelope.REPLIES, replies), routing_key=reply_to)

    async def _handle_job(self, delivery: Delivery, cause: str, queue: str) -> None:
        """A job's message: nobody waits for a reply, its record says that it has failed."""
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
            tenant, trace = request.tenant.decode("utf-8", "replace"), request.trace.decode("latin-1")
            letter = replace(letter, attempt=request.attempt, tenant=tenant, trace=trace)
        await self._letters.bury(letter, request, delivery.body)

    async def _fail(self, id_: bytes, cause: str) -> None:
        # Taken as a worker takes it: if one runs it after all, or it is over, that stands.
        (taken,) = await self._jobs.take([Take(id_, "router", False, 0, TOKEN)])
        if taken.outcome == "run":
            error = {"reason": cause, "message": f"the job's message could not be handled: {cause}"}
            await self._jobs.finish([Finish(id_, taken.attempt, "failed", error=error)])
