"""The way of a job into the queue, and what can be asked of it afterwards.

A job is told to its caller (202) only when its record is on disk and its message is confirmed by a quorum
queue. Records and confirms of many jobs are awaited together: each job has a task, the store groups them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from services.gateway.adapters.job_queue import JobQueue
from services.gateway.adapters.queued_marker import QueuedMarker
from services.gateway.application.inference.core import InferenceCore
from services.gateway.application.jobs.backlog import BacklogEstimate
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.job_options import JobOptions
from services.gateway.domain.job_results import ask_of
from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.errors import BadRequest, Conflict, NotFound, Overloaded, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.jobs import Accepted, Idempotency, Job, JobLoad, NewJob, new_id
from tidegate.kernel.store import JobStore, StoreUnavailable

log = telemetry.logger(__name__)

# Submissions that wait for store and broker at once; more are told to come back.
MOST_UNDER_WAY = 10_000
POLL_S = 2.0
# A store that restarts is back within this time.
PATIENCE_S = 10.0
AGAIN_S = 0.1


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A request that was checked and may become a job."""

    endpoint: str
    route: DeploymentRoute
    request: Decoded
    ask: dict[str, Any]
    options: JobOptions
    principal: str
    trace: bytes = b""
    idempotency: Idempotency | None = None
    batch: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """A job that may be told to its caller. ``fresh`` False: it is that of an earlier call with its key.

    ``position``: about how many jobs are before it; None: nobody knows.
    """

    job: Job
    fresh: bool
    position: int | None


class JobService:
    """The gateway's side of durable jobs. Times in seconds."""

    def __init__(
        self,
        core: InferenceCore,
        store: JobStore,
        queue: JobQueue,
        claims: Claims,
        *,
        ttl_s: float,
        retention_s: float,
        most_waiting: int,
    ) -> None:
        self._core = core
        self._queue = queue
        self._claims = claims
        self._ttl_s = ttl_s
        self._retention_s = retention_s
        self._most_waiting = most_waiting
        self._under_way = 0
        self._waiting = BacklogEstimate(self._loads)
        self._marks = QueuedMarker(store)
        self.store = store
        self.acknowledged = 0

    def order(
        self,
        model: str,
        version: str,
        decode: Callable[[Contract], Decoded],
        options: JobOptions,
        principal: Principal,
        *,
        trace: bytes = b"",
        idempotency: Idempotency | None = None,
        batch: str | None = None,
        line: int | None = None,
    ) -> JobRequest:
        """A request to ``model``, checked against the Deployment that will run it. Raises TidegateError."""
        if self._under_way >= MOST_UNDER_WAY:
            raise Overloaded(f"{self._under_way} jobs are being accepted already", retry_after_s=1.0)
        endpoint, route = self._core.pick(model, version)
        if route.decoupled:
            raise BadRequest(
                f"model {model!r} is decoupled (any number of answers to a request), but a job has "
                "one answer: use /generate_stream"
            )
        try:
            request = decode(route.contract)
        except Unavailable as error:
            raise self._core.for_want_of_replica(route, error) from None
        ask = ask_of(request)
        return JobRequest(
            endpoint.name, route, request, ask, options, principal.id, trace[:255], idempotency, batch, line
        )

    async def submit(self, order: JobRequest) -> SubmittedJob:
        """Return once record and message of the job are on disk. Raises Conflict, Overloaded, Unavailable."""
        self._under_way += 1
        try:
            await self._queue.ready()
            position = await self._waiting.ahead(order.route.name)
            if position is not None and position >= self._most_waiting:
                raise Overloaded(
                    f"{order.route.name}: {position} jobs wait already, the limit is {self._most_waiting}",
                    retry_after_s=10.0,
                )
            new = await self._new(order)
            try:
                accepted = await self._accept(new)
            except Conflict:
                await self._drop_payload(new)
                raise
            if not accepted.fresh:
                await self._drop_payload(new)
                return await self._again(accepted.id)
            try:
                await self._queue.publish(new.deployment, new.level, new.frame)
            except Unavailable:
                await self._take_back(new)
                raise
            self._marks.add(new.id)
        finally:
            self._under_way -= 1
        self.acknowledged += 1
        self._core.wake(order.route)
        return SubmittedJob(_queued(new), True, position)

    async def stop(self) -> None:
        """Return when what was submitted is written down."""
        await self._marks.stop()

    async def position(self, job: Job) -> int | None:
        """About how many jobs are before this one; None when it waits no more."""
        return await self.store.position(job) if job.status == "queued" else None

    async def wait(self, id_: bytes, timeout_s: float) -> Job:
        """The job when it is over, or as it is after ``timeout_s``. Raises NotFound."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self.store.watch().changes(id_) as notices:
                job = await self._must(id_)
                while not job.terminal:
                    # A notice may be lost with its connection, the record is not.
                    left = max(0.001, min(POLL_S, deadline - asyncio.get_running_loop().time()))
                    with suppress(TimeoutError):
                        await asyncio.wait_for(anext(notices), left)
                    job = await self._must(id_)
                return job
        return await self._must(id_)

    async def find(self, id_: bytes, principal: Principal) -> Job:
        """A job that ``principal`` may see: its own, or any with the scope admin. Raises NotFound."""
        job = await self.store.get(id_)
        if job is None or not principal.sees(job.principal):
            raise NotFound(f"there is no job {id_.hex()}")
        return job

    async def cancel(self, job: Job) -> Job:
        """End a job that is not over; what it becomes is what came first."""
        after = await self.store.cancel(job.id)
        if after is None:
            raise NotFound(f"there is no job {job.id.hex()}")
        if after.state == "cancelled" and not job.terminal:
            await self._queue.cancel([job.id])
        return after

    async def cancel_all(self, ids: Sequence[bytes]) -> None:
        """End several jobs, whatever state they are in."""
        after = await asyncio.gather(*(self.store.cancel(id_) for id_ in ids))
        await self._queue.cancel([job.id for job in after if job is not None and job.state == "cancelled"])

    async def retry(self, job: Job) -> SubmittedJob:
        """A new job with the request of one that failed; asked for again, the same new job.

        Raises Conflict where there is nothing to retry.
        """
        shown = job.id.hex()
        if not job.terminal or job.state == "succeeded":
            raise Conflict(f"only failed jobs can be retried; job {shown} is {job.status}")
        frame = await self.store.request(job.id)
        if frame is None:
            why = (
                f"the request of job {shown} is no longer kept, so it cannot be retried: submit it again"
                if job.state == "failed"
                else f"only failed jobs can be retried; job {shown} was {job.status}: submit it again"
            )
            raise Conflict(why, reason="request_gone")
        request = envelope.read_request(frame)
        data = await self._claims.redeem(request.data) if request.flags & envelope.CLAIM else request.data
        _, route = self._core.pick(job.endpoint, str(job.version))
        options = JobOptions(job.level, (job.expires_ms - job.created_ms) / 1e3, job.webhook, job.metadata)
        decoded = Decoded("", request.rows, request.key, data, None, False)
        ask = job.ask | {"retry_of": shown}
        once = Idempotency(f"retry {shown}", job.id)
        order = JobRequest(job.endpoint, route, decoded, ask, options, job.principal, request.trace, once)
        return await self.submit(order)

    async def _new(self, order: JobRequest) -> NewJob:
        """The job's record, its payload in the blob store where it is too large for a message."""
        now_ms = int(time.time() * 1e3)
        ttl_s = order.options.ttl_s or self._ttl_s
        id_, expires_ms = new_id(now_ms, os.urandom(10)), now_ms + int(ttl_s * 1e3)
        request, route = order.request, order.route
        flags = (envelope.RETRY_SAFE if route.retry_safe else 0) | request.priority << envelope.PRIORITY_SHIFT
        data: list[Buffer] = request.data
        if self._claims.needed(sum(map(len, data))):
            data = [await self._claims.give(data, ttl_s + self._retention_s, durable=True)]
            flags |= envelope.CLAIM
        tenant = order.principal.encode()[:255]
        frame = envelope.request_frame(
            id_, expires_ms, request.rows, request.key, data, tenant=tenant, trace=order.trace, flags=flags
        )
        return NewJob(
            id=id_,
            frame=frame,
            model=route.model,
            endpoint=order.endpoint,
            deployment=route.name,
            version=int(route.version),
            principal=order.principal,
            created_ms=now_ms,
            expires_ms=expires_ms,
            level=order.options.level,
            retry_safe=route.retry_safe,
            ask=order.ask,
            webhook=order.options.webhook,
            batch=order.batch,
            line=order.line,
            metadata=order.options.metadata,
            idempotency=order.idempotency,
        )

    async def _accept(self, new: NewJob) -> Accepted:
        """Record it. A store that is away is asked again: what it has already it does not take twice."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await self.store.accept(new)
            except StoreUnavailable:
                if time.monotonic() > give_up_at:
                    raise
            await asyncio.sleep(AGAIN_S)

    async def _again(self, id_: bytes) -> SubmittedJob:
        """The job of an earlier call with the same key, which may have ended before its message was sent."""
        job = await self._must(id_)
        if job.state == "accepting" and (frame := await self.store.request(id_)) is not None:
            await self._queue.publish(job.deployment, job.level, frame)
            self._marks.add(id_)
        return SubmittedJob(job, False, await self.position(job))

    async def _take_back(self, new: NewJob) -> None:
        """Its caller is told that it was not taken; with a key he will ask again, and it goes on then."""
        if new.idempotency is None:
            with suppress(StoreUnavailable):  # then it runs, and nobody asks for it
                await self.store.cancel(new.id)

    async def _drop_payload(self, new: NewJob) -> None:
        request = envelope.read_request(new.frame)
        if request.flags & envelope.CLAIM:
            await self._claims.drop(request.data[0])

    async def _loads(self) -> Mapping[str, JobLoad]:
        return (await self.store.counts()).deployments

    async def _must(self, id_: bytes) -> Job:
        job = await self.store.get(id_)
        if job is None:
            raise NotFound(f"there is no job {id_.hex()}")
        return job


def _queued(new: NewJob) -> Job:
    """A new job's record as it is once it is queued."""
    return Job(
        id=new.id,
        state="queued",
        attempt=0,
        model=new.model,
        endpoint=new.endpoint,
        deployment=new.deployment,
        version=new.version,
        principal=new.principal,
        level=new.level,
        created_ms=new.created_ms,
        expires_ms=new.expires_ms,
        queued_ms=int(time.time() * 1e3),
        ask=new.ask,
        webhook=new.webhook,
        batch=new.batch,
        line=new.line,
        metadata=new.metadata,
        retry_safe=new.retry_safe,
    )
