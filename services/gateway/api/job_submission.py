"""Submit jobs on the hot path: an inference call with a ``Prefer`` header, or POST /v1/jobs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress

import orjson

from services.gateway.api.body_limits import Headers
from services.gateway.api.compression import HttpResponse, deliver
from services.gateway.api.inference.request_target import SUBMIT_JOB, Target
from services.gateway.api.job_responses import JobResponses
from services.gateway.application.access import Access, Grant
from services.gateway.application.access_log import AccessLog
from services.gateway.application.jobs.submission import JobRequest, JobSubmitter
from services.gateway.application.jobs.tracking import JobTracker
from services.gateway.domain import job_options, oip
from services.gateway.domain.contract import check_name
from services.gateway.domain.job_options import JobOptions, Preference
from services.gateway.domain.traffic_split import Origin
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, Forbidden, TidegateError, Unavailable
from tidegate.kernel.protocol.access import INFER, Principal, lacks
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.jobs import Idempotency, Job
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)

_INTERNAL_ERROR = "internal error; see the log of the service"

OnDone = Callable[[HttpResponse], None]
OnAccepted = Callable[[HttpResponse, Job], None]
OnFailed = Callable[[TidegateError], None]


class JobSubmissionHandler:
    """The handler of job submissions. A submission continues if its caller disconnects."""

    def __init__(
        self,
        submitter: JobSubmitter,
        tracker: JobTracker,
        responses: JobResponses,
        access: Access,
        log: AccessLog | None = None,
    ) -> None:
        self._submitter = submitter
        self._tracker = tracker
        self._access = access
        self._responses = responses
        self._log = log or AccessLog.off()
        self._tasks = TaskSet()

    @staticmethod
    def preference(target: Target, headers: Headers) -> Preference | None:
        """Return the caller's preference for a job; None if the call is an interactive request."""
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
        done: OnDone,
        failed: OnFailed,
    ) -> None:
        """Check a request, and begin to accept it as a job in the background.

        Later, ``done`` is called with the response, or ``failed`` with the error. ``length``: the size of the
        body's JSON part in bytes; None: the whole body is JSON. Raises a TidegateError if the request is not
        valid or not admitted.
        """
        trace = self._log.begin(rid, headers)
        request, grant = self._read(target, headers, body, length, principal, trace)
        began, received, endpoint, route = time.perf_counter(), len(body), request.endpoint, request.route

        def accepted(response: HttpResponse, job: Job) -> None:
            if self._log.take():
                self._log.accepted(
                    endpoint, route.name, route.version, job.id.hex(), principal, telemetry.shown_id(rid),
                    status=response.status, received=received, sent=len(response.body), headers=headers,
                    total=time.perf_counter() - began,
                )  # fmt: skip
            self._log.trace_job(
                trace, headers, endpoint, route.name, job.id.hex(), status=response.status, started=began
            )
            done(response)

        self._tasks.start(self._accept(request, grant, received, prefer, headers, rid, accepted, failed))

    def _read(
        self,
        target: Target,
        headers: Headers,
        body: Buffer,
        length: int | None,
        principal: Principal,
        trace: bytes,
    ) -> tuple[JobRequest, Grant | None]:
        if not principal.may(INFER):
            raise Forbidden(lacks(principal, (INFER,)))
        key = job_options.check_key(headers.get(b"idempotency-key"))
        idempotency = Idempotency(key, _digest(target, headers, body)) if key is not None else None
        options = job_options.from_headers(headers)
        head, tail = oip.parts(body, length)
        if target is SUBMIT_JOB:
            model, version, options = _read_fields(head, options)
        else:
            model, version = target
        grant = self._access.admit(principal, model)
        try:
            request = self._submitter.check(
                model,
                version,
                lambda contract: oip.decode_head(head, tail, contract),
                options,
                principal,
                trace=trace,
                idempotency=idempotency,
                origin=lambda: Origin(headers, principal.id, lambda: oip.request_parameters(body, length)),
            )
        except BaseException:
            if grant is not None:
                grant.cancel()
            raise
        return request, grant

    async def _accept(
        self,
        request: JobRequest,
        grant: Grant | None,
        received: int,
        prefer: Preference,
        headers: Headers,
        rid: bytes,
        accepted: OnAccepted,
        failed: OnFailed,
    ) -> None:
        try:
            submitted = await self._submitter.submit(request)
            job = submitted.job
            del request  # frees the request's tensors while the caller waits
            if grant is not None:
                grant.accepted(received)
            if prefer.wait_s and not job.terminal:
                with suppress(Unavailable):  # if the wait fails, answer 202: the job is already accepted
                    job = await self._tracker.wait(job.id, prefer.wait_s)
            if prefer.wait_s and job.terminal:
                response = await self._responses.result(job, headers, rid)
                response.headers.append((b"preference-applied", prefer.applied))
                deliver(response, headers, lambda response: accepted(response, job))
                return
            response = self._responses.accepted(submitted, job, prefer, rid)
            if grant is not None:
                response.headers.extend(grant.headers())
            accepted(response, job)
        except TidegateError as error:
            failed(error)
        except Exception:
            log.exception(
                "unexpected error while a job was accepted", extra={"request_id": rid.decode("latin-1")}
            )
            failed(TidegateError(_INTERNAL_ERROR))
        finally:
            if grant is not None:
                grant.cancel()


def _read_fields(head: dict[str, object] | None, base: JobOptions) -> tuple[str, str, JobOptions]:
    """Return the model, version and options from the body of POST /v1/jobs.

    Raises BadRequest if the model is missing, or if one of these values is not valid.
    """
    if head is None:
        raise BadRequest(f"{oip.HEADER_LENGTH} is 0, but the JSON part must name the model of the job")
    model = head.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("'model' must be the name of a model")
    check_name("model", model)
    version = job_options.check_version(head.get("version"))
    return model, version, job_options.from_fields(head, base)


def _name(target: Target) -> str:
    """Return the target as text for ``_digest``.

    Never change the form of this text. Digests of earlier calls are stored with their idempotency keys, and a
    repeated call must have the same digest.
    """
    if target is SUBMIT_JOB:
        return "\njobs"
    return f"{target.model}/versions/{target.version}" if target.version else target.model


def _digest(target: Target, headers: Headers, body: Buffer) -> bytes:
    """Return a hash of a request and its options.

    A call that repeats an idempotency key must have the same hash as the first call.
    """
    options = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in sorted(headers.items())
        if name in _OPTION_HEADERS
    }
    digest = hashlib.sha256(orjson.dumps([_name(target), options]))
    digest.update(body)
    return digest.digest()


_OPTION_HEADERS = frozenset(
    {b"inference-header-content-length", b"x-job-priority", b"x-job-ttl", b"x-job-webhook"}
)
