"""Encode responses about jobs: the 202, the status, and the result as JSON or binary."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson

from services.gateway.api.body_limits import Headers
from services.gateway.api.compression import HttpResponse
from services.gateway.api.llm.openai_errors import openai_error
from services.gateway.application.feedback import ASK
from services.gateway.application.feedback import HEADER as FEEDBACK_ID
from services.gateway.application.jobs.backlog import estimated_start_ms
from services.gateway.application.jobs.results import JobResults
from services.gateway.application.jobs.submission import SubmittedJob
from services.gateway.domain import job_results, llm_jobs, oip
from services.gateway.domain.job_options import Preference
from services.gateway.domain.llm.refusal import EngineRefused
from services.gateway.domain.llm_jobs import LlmJobAnswer
from services.gateway.domain.replica_fleet import ReplicaFleet
from tidegate.kernel.protocol.jobs import Job, iso

_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
_HEADER_LENGTH = oip.HEADER_LENGTH.lower().encode()


class JobResponses:
    """An encoder of jobs and their results."""

    def __init__(self, results: JobResults, fleet: Callable[[str], ReplicaFleet]) -> None:
        self._results = results
        self._fleet = fleet

    def accepted(self, submitted: SubmittedJob, job: Job, prefer: Preference, rid: bytes) -> HttpResponse:
        """Return the response 202, with the job's URLs and estimated start.

        ``submitted``: the job at its submission. ``job``: the same job as it is now.
        """
        position = submitted.position if job.status == "queued" else None
        body = orjson.dumps(self.document(job, position))
        headers = [
            _JSON,
            (b"content-length", b"%d" % len(body)),
            (b"location", b"/v1/jobs/" + job.id.hex().encode()),
            (b"preference-applied", prefer.applied),
            (b"x-request-id", rid),
            *_feedback_header(job),
        ]
        if not submitted.fresh:
            headers.append((b"idempotency-replayed", b"true"))
        return HttpResponse(202, headers, body)

    def document(self, job: Job, position: int | None) -> dict[str, Any]:
        """Return the job as the API shows it. ``position``: the number of jobs ahead; None if unknown."""
        document = job.public()
        path = f"/v1/jobs/{document['id']}"
        start_ms = None
        if job.status == "queued" and position is not None:
            start_ms = estimated_start_ms(position, self._fleet(job.deployment))
        return document | {
            "retry_of": job.ask.get("retry_of"),
            "feedback_id": job.ask.get(ASK),
            "position": position,
            "estimated_start": None if start_ms is None else iso(int(time.time() * 1e3 + start_ms)),
            "urls": {
                "status": path,
                "result": f"{path}/result",
                "cancel": path,
                "events": f"{path}/events",
                "retry": f"{path}/retry",
            },
        }

    async def result(self, job: Job, headers: Headers, rid: bytes) -> HttpResponse:
        """Return the result of a job that has ended, in the requested form.

        If the job did not succeed, raise its error. Only an error that the engine of a language model
        returned is not raised: it is returned as the response.
        """
        if llm_jobs.is_llm(job.ask) and job.state in ("succeeded", "failed") and job.result_size:
            return await self._llm_result(job, rid)
        if job.state != "succeeded":
            raise job_results.failure_of(job)
        frame = await self._results.frame(job)
        body, tail = await self._results.encoded(
            job, frame, job_results.prefers_binary(headers.get(b"accept"))
        )
        answer = [
            _BINARY if tail else _JSON,
            (b"content-length", b"%d" % (len(body) + sum(map(len, tail)))),
            (b"content-location", b"/v1/jobs/%b/result" % job.id.hex().encode()),
            (b"x-request-id", rid),
            *_feedback_header(job),
        ]
        if tail:
            answer.append((_HEADER_LENGTH, b"%d" % len(body)))
        return HttpResponse(200, answer, body, tail)

    async def _llm_result(self, job: Job, rid: bytes) -> HttpResponse:
        """Return the engine's answer unchanged, or the engine's error in OpenAI's format."""
        answer = await self._results.llm_answer(job, await self._results.frame(job))
        if answer.status >= 400:
            refused = openai_error(EngineRefused(answer.status, answer.body))
            answer = LlmJobAnswer(refused.status, refused.body())
        headers = [
            _JSON,
            (b"content-length", b"%d" % len(answer.body)),
            (b"content-location", b"/v1/jobs/%b/result" % job.id.hex().encode()),
            (b"x-request-id", rid),
            *_feedback_header(job),
        ]
        return HttpResponse(answer.status, headers, answer.body)


def _feedback_header(job: Job) -> list[tuple[bytes, bytes]]:
    id_ = job.ask.get(ASK)
    return [(FEEDBACK_ID, id_.encode())] if id_ else []
