"""Run a request to a language model as a job: ``Prefer: respond-async`` or ``wait=N`` on OpenAI's paths."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from typing import Any

import orjson
from starlette.responses import Response

from services.gateway.api.compression import HttpResponse
from services.gateway.api.job_http import as_response
from services.gateway.api.job_responses import JobResponses
from services.gateway.api.llm.door import ReceivedRequest, principal
from services.gateway.application.access import Access, Grant
from services.gateway.application.access_log import AccessLog
from services.gateway.application.jobs.submission import JobRequest, JobSubmitter
from services.gateway.application.jobs.tracking import JobTracker
from services.gateway.domain import job_options, llm_jobs
from services.gateway.domain.job_options import JobOptions, Preference
from services.gateway.domain.llm.band import band_of
from services.gateway.domain.traffic_split import Origin
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, Forbidden, Unavailable
from tidegate.kernel.protocol.access import INFER, Principal, lacks
from tidegate.kernel.protocol.jobs import Idempotency


class LlmJobs:
    """The handler of language-model requests that run as jobs. A job goes on if its caller disconnects."""

    def __init__(
        self,
        submitter: JobSubmitter,
        tracker: JobTracker,
        responses: JobResponses,
        access: Access,
        log: AccessLog,
    ) -> None:
        self._submitter = submitter
        self._tracker = tracker
        self._responses = responses
        self._access = access
        self._log = log

    @staticmethod
    def preference(received: ReceivedRequest) -> Preference | None:
        """Return the caller's preference for a job; None if the caller wants no job."""
        return job_options.preference(received.headers.get(b"prefer"))

    async def answer(self, received: ReceivedRequest, path: str, prefer: Preference) -> Response:
        """Accept a job. Return the 202, or the model's own answer if it comes within the requested wait.

        Raises a TidegateError if the job is not accepted, or if it fails within the requested wait.
        """
        caller = principal()
        if not caller.may(INFER):
            raise Forbidden(lacks(caller, (INFER,)))
        rid = telemetry.request_id.get().encode("latin-1", "replace")
        model = llm_jobs.check_body(received.body)
        grant = self._access.admit(caller, model.partition(":")[0])
        try:
            return await self._accept(
                self._request(received, path, caller, rid), received, grant, prefer, rid
            )
        finally:
            if grant is not None:
                grant.cancel()

    def _request(self, received: ReceivedRequest, path: str, caller: Principal, rid: bytes) -> JobRequest:
        key = job_options.check_key(received.headers.get(b"idempotency-key"))
        options = _options(received)
        idempotency = Idempotency(key, _digest(path, received.body, options)) if key is not None else None
        return self._submitter.check_llm(
            path,
            received.body,
            options,
            caller,
            trace=self._log.begin(rid, received.headers),
            idempotency=idempotency,
            origin=lambda: Origin(received.headers, caller.id, lambda: received.body),
        )

    async def _accept(
        self,
        request: JobRequest,
        received: ReceivedRequest,
        grant: Grant | None,
        prefer: Preference,
        rid: bytes,
    ) -> Response:
        route, trace = request.route, request.trace
        submitted = await self._submitter.submit(request)
        del request  # frees the request's body while the caller waits
        job = submitted.job
        if grant is not None:
            grant.accepted(received.size)
        if prefer.wait_s and not job.terminal:
            with suppress(Unavailable):  # if the wait fails, answer 202: the job is already accepted
                job = await self._tracker.wait(job.id, prefer.wait_s)
        answer: HttpResponse
        if prefer.wait_s and job.terminal:
            answer = await self._responses.result(job, received.headers, rid)
            answer.headers.append((b"preference-applied", prefer.applied))
        else:
            answer = self._responses.accepted(submitted, job, prefer, rid)
            if grant is not None:
                answer.headers.extend(grant.headers())
        if self._log.take():
            self._log.accepted(
                job.endpoint, route.name, route.version, job.id.hex(), principal(), telemetry.shown_id(rid),
                status=answer.status, received=received.size, sent=len(answer.body), headers=received.headers,
                total=time.perf_counter() - received.started,
            )  # fmt: skip
        self._log.trace_job(
            trace, received.headers, job.endpoint, route.name, job.id.hex(),
            status=answer.status, started=received.started,
        )  # fmt: skip
        return await as_response(answer, received.headers)


def _options(received: ReceivedRequest) -> JobOptions:
    """Return a job's options. Without ``X-Job-Priority``, its priority is the band of the request."""
    base = JobOptions(level=band_of(received.headers, received.body))
    return job_options.from_headers(received.headers, base)


def _digest(path: str, body: dict[str, Any], options: JobOptions) -> bytes:
    """Return a hash of a request and its options.

    A call that repeats an idempotency key must have the same hash as the first call.
    """
    parts = [path, options.level, options.ttl_s, options.webhook, body]
    try:
        return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).digest()
    except TypeError as error:  # the body is nested too deeply
        raise BadRequest(f"the request cannot be a job: {error}") from None
