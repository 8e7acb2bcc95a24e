"""Jobs on the hot path: a call with ``Prefer``, or POST /v1/jobs; headers and body in, a response later."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from contextlib import suppress

import orjson

from services.gateway.api.body_limits import Headers
from services.gateway.api.compression import HttpResponse, deliver
from services.gateway.api.inference.target import SUBMIT_JOB, Target
from services.gateway.api.job_responses import JobResponses
from services.gateway.application.access import Access, Grant
from services.gateway.application.access_log import AccessLog
from services.gateway.application.jobs.submission import JobRequest, JobService
from services.gateway.domain import job_options, oip
from services.gateway.domain.contract import check_name
from services.gateway.domain.job_options import JobOptions, Preference
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, Forbidden, TidegateError, Unavailable
from tidegate.kernel.protocol.access import INFER, Principal, lacks
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.jobs import Idempotency, Job

log = telemetry.logger(__name__)

_BROKEN = "internal error; see the log of the service"

Done = Callable[[HttpResponse], None]
Answered = Callable[[HttpResponse, Job], None]
Failed = Callable[[TidegateError], None]


class JobSubmissionHandler:
    """Takes jobs in. Its caller may leave at any time: what was begun goes on."""

    def __init__(
        self, jobs: JobService, answers: JobResponses, access: Access, log: AccessLog | None = None
    ) -> None:
        self._jobs = jobs
        self._access = access
        self._answers = answers
        self._log = log or AccessLog.off()
        self._tasks: set[asyncio.Task[None]] = set()

    @staticmethod
    def preference(target: Target, headers: Headers) -> Preference | None:
        """What makes this call a job, or None for one that is answered by waiting for it."""
        prefer = job_options.preference(headers.get(b"prefer")) if b"prefer" in headers else None
        return prefer or (Preference() if target is SUBMIT_JOB else None)

    def begin(
        self,
        target: Target,
        headers: Headers,
        body: Buffer,
        length: int | None,
        principal: Principal,
        prefer: Preference,
        rid: bytes,
        done: Done,
        failed: Failed,
    ) -> None:
        """Start to accept a job; ``length`` is that of the body's JSON part. One of the last two is called,
        later. Raises a TidegateError for what is refused at once.
        """
        order, grant = self._order(target, headers, body, length, principal, rid)
        began, received, endpoint, route = time.perf_counter(), len(body), order.endpoint, order.route

        def answered(response: HttpResponse, job: Job) -> None:
            if self._log.take():
                self._log.accepted(
                    endpoint, route.name, route.version, job.id.hex(), principal, telemetry.shown_id(rid),
                    status=response.status, received=received, sent=len(response.body), headers=headers,
                    total=time.perf_counter() - began,
                )  # fmt: skip
            done(response)

        task = asyncio.create_task(
            self._accept(order, grant, received, prefer, headers, rid, answered, failed)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _order(
        self,
        target: Target,
        headers: Headers,
        body: Buffer,
        length: int | None,
        principal: Principal,
        rid: bytes,
    ) -> tuple[JobRequest, Grant | None]:
        if not principal.may(INFER):
            raise Forbidden(lacks(principal, (INFER,)))
        key = job_options.check_key(headers.get(b"idempotency-key"))
        idempotency = Idempotency(key, _digest(target, headers, body)) if key is not None else None
        options = job_options.from_headers(headers)
        head, tail = oip.parts(body, length)
        if target is SUBMIT_JOB:
            model, version, options = _named(head, options)
        else:
            model, version = target
        grant = self._access.admit(principal, model)
        try:
            order = self._jobs.order(
                model,
                version,
                lambda contract: oip.decode_head(head, tail, contract),
                options,
                principal,
                trace=rid,
                idempotency=idempotency,
            )
        except BaseException:
            if grant is not None:
                grant.cancel()
            raise
        return order, grant

    async def _accept(
        self,
        order: JobRequest,
        grant: Grant | None,
        received: int,
        prefer: Preference,
        headers: Headers,
        rid: bytes,
        answered: Answered,
        failed: Failed,
    ) -> None:
        try:
            submitted = await self._jobs.submit(order)
            job = submitted.job
            del order  # its tensors: who waits for the result does not hold them
            if grant is not None:
                grant.accepted(received)
            if prefer.wait_s and not job.terminal:
                with suppress(Unavailable):  # it was taken in all the same, and its caller must hear of that
                    job = await self._jobs.wait(job.id, prefer.wait_s)
            if prefer.wait_s and job.terminal:
                response = await self._answers.result(job, headers, rid)
                response.headers.append((b"preference-applied", prefer.applied))
                deliver(response, headers, lambda response: answered(response, job))
                return
            response = self._answers.accepted(submitted, job, prefer, rid)
            if grant is not None:
                response.headers.extend(grant.headers())
            answered(response, job)
        except TidegateError as error:
            failed(error)
        except Exception:
            log.exception("a job was not accepted", extra={"request_id": rid.decode("latin-1")})
            failed(TidegateError(_BROKEN))
        finally:
            if grant is not None:
                grant.cancel()


def _named(head: dict[str, object] | None, base: JobOptions) -> tuple[str, str, JobOptions]:
    """Model, version and options in the body of POST /v1/jobs; raises BadRequest."""
    if head is None:
        raise BadRequest(f"{oip.HEADER_LENGTH} is 0, but only JSON can name the model of a job")
    model = head.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("'model' must be the name of a model")
    check_name("model", model)
    version = job_options.check_version(head.get("version"))
    return model, version, job_options.from_fields(head, base)


def _name(target: Target) -> str:
    """Return the target as stored digests have it; another form would break keys that are in use."""
    if target is SUBMIT_JOB:
        return "\njobs"
    return f"{target.model}/versions/{target.version}" if target.version else target.model


def _digest(target: Target, headers: Headers, body: Buffer) -> bytes:
    """What must be the same for the same key: the request and its options, not how long its caller waits."""
    told = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in sorted(headers.items())
        if name in _PART
    }
    found = hashlib.sha256(orjson.dumps([_name(target), told]))
    found.update(body)
    return found.digest()


_PART = frozenset({b"inference-header-content-length", b"x-job-priority", b"x-job-ttl", b"x-job-webhook"})
