"""Submit jobs to the queue, and submit failed jobs again.

A caller gets the 202 only when the job's record is on disk and a quorum queue has confirmed its message. The
store groups the calls of many submissions, so that one write to the disk serves all of them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from services.gateway.adapters.job_queue import JobQueue
from services.gateway.adapters.queued_marker import QueuedMarker
from services.gateway.application.feedback import ASK
from services.gateway.application.inference.core import InferenceCore, not_tensors
from services.gateway.application.jobs.backlog import BacklogEstimate
from services.gateway.application.jobs.tracking import JobTracker
from services.gateway.application.llm.core import LlmCore
from services.gateway.application.llm.token_limits import Reservation
from services.gateway.domain import llm_jobs
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.job_options import JobOptions
from services.gateway.domain.job_results import answer_form
from services.gateway.domain.routing import DeploymentRoute
from services.gateway.domain.traffic_split import Origin
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.errors import BadRequest, Conflict, Overloaded, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.jobs import Accepted, Idempotency, Job, JobLoad, NewJob, new_id
from tidegate.kernel.protocol.tenant import tenant_of
from tidegate.kernel.store import StoreUnavailable

log = telemetry.logger(__name__)

# The largest number of submissions that may wait for the store and the broker. Further submissions are
# refused.
MAX_SUBMITTING = 10_000
# The longest time to wait for the store. A restart of the store takes less.
STORE_TIMEOUT_S = 10.0
RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A checked request that is ready to be submitted as a job.

    ``ask``: the form that the caller wants for the answer. ``charge``: for a language model, a function that
    charges the request's tokens; it raises TooMany or BadRequest at a token limit.
    """

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
    charge: Callable[[], Awaitable[Reservation | None]] | None = None


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """An accepted job.

    ``fresh`` is False if an earlier call with the same idempotency key submitted the job. ``position``: about
    how many jobs are ahead of it; None if unknown.
    """

    job: Job
    fresh: bool
    position: int | None


class JobSubmitter:
    """Submits durable jobs. Times are in seconds. ``llm`` finds language models."""

    def __init__(
        self,
        core: InferenceCore,
        llm: LlmCore,
        tracker: JobTracker,
        queue: JobQueue,
        claims: Claims,
        *,
        ttl_s: float,
        retention_s: float,
        max_queued: int,
    ) -> None:
        self._core = core
        self.llm = llm
        self._tracker = tracker
        self._store = tracker.store
        self._queue = queue
        self._claims = claims
        self._ttl_s = ttl_s
        self._retention_s = retention_s
        self._max_queued = max_queued
        self._submitting = 0
        self._backlog = BacklogEstimate(self._loads)
        self._marks = QueuedMarker(tracker.store)
        self.acknowledged = 0

    def check(
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
        origin: Callable[[], Origin] | None = None,
    ) -> JobRequest:
        """Check a request to ``model`` against the Deployment that will run it. Raises TidegateError."""
        self._check_room()
        endpoint, route = self._core.pick(model, version, origin)
        if route.llm is not None:
            raise not_tensors(model)
        if route.decoupled:
            raise BadRequest(
                f"model {model!r} is decoupled (it returns any number of answers to a request), but a job "
                "has one answer: use /generate_stream"
            )
        try:
            request = decode(route.contract)
        except Unavailable as error:
            raise self._core.needs_replica(route, error) from None
        if request.sequence is not None:
            raise BadRequest(
                "jobs run in any order, so a job cannot belong to a sequence (sequence_id). Send the "
                f"requests of a sequence to /v2/models/{model}/infer"
            )
        return JobRequest(
            endpoint.name,
            route,
            request,
            answer_form(request) | self._feedback(endpoint.name, version, route, origin, trace, principal),
            options,
            principal.id,
            trace[:255],
            idempotency,
            batch,
            line,
        )

    def check_llm(
        self,
        path: str,
        body: dict[str, Any],
        options: JobOptions,
        principal: Principal,
        *,
        trace: bytes = b"",
        idempotency: Idempotency | None = None,
        batch: str | None = None,
        line: int | None = None,
        origin: Callable[[], Origin] | None = None,
    ) -> JobRequest:
        """Check a request to a language model. ``body`` and ``path`` have the form of OpenAI's API.

        Raises TidegateError.
        """
        self._check_room()
        model = llm_jobs.check_body(body)
        endpoint, route = self.llm.pick(model, origin)
        assert route.llm is not None
        return JobRequest(
            endpoint.name,
            route,
            llm_jobs.decoded(path, body, route.llm.context),
            llm_jobs.ask_of(path, model) | self._feedback(endpoint.name, "", route, origin, trace, principal),
            options,
            principal.id,
            trace[:255],
            idempotency,
            batch,
            line,
            self.llm.job_charge(principal, endpoint.name, path, body, route.llm.context),
        )

    def _feedback(
        self,
        endpoint: str,
        version: str,
        route: DeploymentRoute,
        origin: Callable[[], Origin] | None,
        trace: bytes,
        principal: Principal,
    ) -> dict[str, Any]:
        """Return a dict with the feedback id, to be added to the job's record.

        The dict is empty if the endpoint collects no feedback.
        """
        facts = origin or (lambda: Origin({}, principal.id, dict))
        pending = self._core.feedback.begin(endpoint, version, facts, trace, principal)
        return {} if pending is None else {ASK: pending.id(route).decode()}

    def _check_room(self) -> None:
        if self._submitting >= MAX_SUBMITTING:
            raise Overloaded(
                f"the gateway is already accepting {self._submitting} jobs, which is the limit: send the job "
                "again",
                retry_after_s=1.0,
            )

    async def submit(self, request: JobRequest) -> SubmittedJob:
        """Accept a job. Return it when its record and its message are on disk.

        Raise Conflict if the idempotency key was used before with another request. Raise Overloaded if too
        many jobs are queued. Raise Unavailable if a store or the broker does not answer. Raise TooMany if a
        token limit is reached. Raise BadRequest if the job is larger than a token limit.
        """
        charged = None if request.charge is None else await request.charge()
        fresh = False
        try:
            submitted = await self._submit(request)
            fresh = submitted.fresh
        finally:
            if charged is not None and not fresh:
                charged.settle(0)
        return submitted

    async def _submit(self, request: JobRequest) -> SubmittedJob:
        self._submitting += 1
        try:
            await self._queue.ready()
            position = await self._backlog.ahead(request.route.name)
            if position is not None and position >= self._max_queued:
                raise Overloaded(
                    f"{request.route.name}: {position} jobs are queued, and the limit is {self._max_queued} "
                    "(TIDEGATE_MAX_WAITING_JOBS). Retry after the time in Retry-After",
                    retry_after_s=10.0,
                )
            new = await self._new_record(request)
            try:
                accepted = await self._accept(new)
            except Conflict:
                await self._drop_payload(new)
                raise
            if not accepted.fresh:
                await self._drop_payload(new)
                return await self._earlier(accepted.id)
            try:
                await self._queue.publish(new.deployment, new.level, new.frame)
            except Unavailable:
                await self._withdraw(new)
                raise
            self._marks.add(new.id)
        finally:
            self._submitting -= 1
        self.acknowledged += 1
        self._core.wake(request.route)
        return SubmittedJob(_queued(new), True, position)

    async def of_key(self, principal: str, key: str) -> Job | None:
        """Return the job that a principal submitted with this idempotency key, or None."""
        return await self._store.of_key(principal, key)

    async def stop(self) -> None:
        """Wait until the records of all submitted jobs have the state queued."""
        await self._marks.stop()

    async def retry(self, job: Job) -> SubmittedJob:
        """Submit the request of a failed job as a new job. A repeated call returns the same new job.

        Raises Conflict if the job has not failed, or if its request was deleted.
        """
        job_id = job.id.hex()
        if not job.terminal or job.state == "succeeded":
            raise Conflict(f"only failed jobs can be retried; job {job_id} is {job.status}")
        frame = await self._store.request(job.id)
        if frame is None:
            why = (
                f"the request of job {job_id} was deleted, so it cannot be retried: submit it again"
                if job.state == "failed"
                else f"only failed jobs can be retried; job {job_id} was {job.status}: submit it again"
            )
            raise Conflict(why, reason="request_gone")
        request = envelope.read_request(frame)
        data = await self._claims.redeem(request.data) if request.flags & envelope.CLAIM else request.data
        _, route = self._core.find(job.endpoint, str(job.version))
        options = JobOptions(job.level, (job.expires_ms - job.created_ms) / 1e3, job.webhook, job.metadata)
        decoded = Decoded("", request.rows, request.key, data, None, False)
        ask = job.ask | {"retry_of": job_id}
        idempotency = Idempotency(f"retry {job_id}", job.id)
        again = JobRequest(
            job.endpoint, route, decoded, ask, options, job.principal, request.trace, idempotency
        )
        return await self.submit(again)

    async def _new_record(self, checked: JobRequest) -> NewJob:
        """Return the record of a new job. If the payload is too large for a message, store it as a blob."""
        now_ms = int(time.time() * 1e3)
        ttl_s = checked.options.ttl_s or self._ttl_s
        id_, expires_ms = new_id(now_ms, os.urandom(10)), now_ms + int(ttl_s * 1e3)
        request, route = checked.request, checked.route
        flags = (envelope.RETRY_SAFE if route.retry_safe else 0) | request.priority << envelope.PRIORITY_SHIFT
        data: list[Buffer] = request.data
        if self._claims.needed(sum(map(len, data))):
            data = [await self._claims.give(data, ttl_s + self._retention_s, durable=True)]
            flags |= envelope.CLAIM
        tenant = tenant_of(checked.principal, checked.endpoint)
        frame = envelope.request_frame(
            id_, expires_ms, request.rows, request.key, data, tenant=tenant, trace=checked.trace, flags=flags
        )
        return NewJob(
            id=id_,
            frame=frame,
            model=route.model,
            endpoint=checked.endpoint,
            deployment=route.name,
            version=int(route.version),
            principal=checked.principal,
            created_ms=now_ms,
            expires_ms=expires_ms,
            level=checked.options.level,
            retry_safe=route.retry_safe,
            ask=checked.ask,
            webhook=checked.options.webhook,
            batch=checked.batch,
            line=checked.line,
            metadata=checked.options.metadata,
            idempotency=checked.idempotency,
        )

    async def _accept(self, new: NewJob) -> Accepted:
        """Write the record. If the store does not answer, retry; the store accepts a record only once."""
        give_up_at = time.monotonic() + STORE_TIMEOUT_S
        while True:
            try:
                return await self._store.accept(new)
            except StoreUnavailable:
                if time.monotonic() > give_up_at:
                    raise
            await asyncio.sleep(RETRY_S)

    async def _earlier(self, id_: bytes) -> SubmittedJob:
        """Return the job of an earlier call with the same idempotency key.

        If the earlier call stopped before it published the job, publish the job now.
        """
        job = await self._tracker.get(id_)
        if job.state == "accepting" and (frame := await self._store.request(id_)) is not None:
            await self._queue.publish(job.deployment, job.level, frame)
            self._marks.add(id_)
        return SubmittedJob(job, False, await self._tracker.position(job))

    async def _withdraw(self, new: NewJob) -> None:
        """Cancel a job that was not published.

        Do nothing if it has an idempotency key, because a later call with this key publishes the job.
        """
        if new.idempotency is None:
            with suppress(StoreUnavailable):  # on failure, the job runs, but no caller reads its result
                await self._store.cancel(new.id)

    async def _drop_payload(self, new: NewJob) -> None:
        request = envelope.read_request(new.frame)
        if request.flags & envelope.CLAIM:
            await self._claims.drop(request.data[0])

    async def _loads(self) -> Mapping[str, JobLoad]:
        return (await self._store.counts()).deployments


def _queued(new: NewJob) -> Job:
    """Return a new job in the state queued."""
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
