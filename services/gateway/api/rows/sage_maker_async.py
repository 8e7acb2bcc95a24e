"""Serve SageMaker's asynchronous inference (``invoke_endpoint_async``) as jobs.

The input is read from a store, and the answer is written there. The caller immediately gets the location of
the answer.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import orjson
from fastapi import APIRouter, Request, Response

from services.gateway.adapters.async_store import AsyncStore
from services.gateway.api.body_limits import Body, BodyLimits
from services.gateway.api.rows.door import Received, RowsDoor, principal
from services.gateway.api.rows.errors import sage_maker
from services.gateway.api.rows.sage_maker import TARGET_VARIANT
from services.gateway.application.access import Access
from services.gateway.application.access_log import AccessLog
from services.gateway.application.async_outputs import AsyncOutputs
from services.gateway.application.jobs.submission import JobRequest, JobSubmitter
from services.gateway.domain import async_inference
from services.gateway.domain.async_inference import AnswerPlan
from services.gateway.domain.job_options import JobOptions
from services.gateway.domain.rows.typed_body import TypedBody
from services.gateway.domain.traffic_split import Origin
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.jobs import Job

PROTOCOL = "sagemaker-async"
_HEADER = "x-amzn-sagemaker-"
# The most inputs that a process reads from the store at the same time.
READS = 8


class SageMakerAsyncRoutes:
    """The route of asynchronous inference. If ``store`` is None, calls are refused."""

    def __init__(
        self,
        door: RowsDoor,
        access: Access,
        limits: BodyLimits,
        log: AccessLog,
        submitter: JobSubmitter,
        outputs: AsyncOutputs | None,
        store: AsyncStore | None,
    ) -> None:
        self._door = door
        self._access = access
        self._limits = limits
        self._log = log
        self._submitter = submitter
        self._outputs = outputs
        self._store = store
        self._reads = asyncio.Semaphore(READS)
        self.router = APIRouter(tags=["SageMaker"])
        self.router.add_api_route(
            "/endpoints/{model}/async-invocations", self.invoke, methods=["POST"], response_model=None
        )

    async def invoke(self, request: Request, model: str) -> Response:
        """Accept a job for an input in the store. Answer 202 with the location of its result.

        The header ``X-Amzn-SageMaker-InputLocation`` names the input. The header ``X-Amzn-SageMaker-Accept``
        sets the content type of the result. Without it, the result has the content type of the input.
        """

        async def make(received: Received) -> Response:
            if self._store is None or self._outputs is None:
                raise BadRequest(
                    "asynchronous inference has no store: an operator must set TIDEGATE_ASYNC_URL"
                )
            return await self._accept(received, model, self._store, self._outputs)

        return await self._door.respond(request, make, sage_maker)

    async def _accept(
        self, received: Received, model: str, store: AsyncStore, outputs: AsyncOutputs
    ) -> Response:
        key = async_inference.key_of(received.header(f"{_HEADER}inputlocation"), store.root)
        options = JobOptions(ttl_s=async_inference.ttl_s(received.header(f"{_HEADER}requestttlseconds")))
        wanted_id = received.header(f"{_HEADER}inference-id")
        async_inference.inference_id(wanted_id, "")
        self._door.endpoint(model)
        grant = self._access.admit(principal(), model)
        held = Body(self._limits, known=True)
        try:
            async with self._reads:
                body = await store.read(key, self._limits.body_bytes)
                if (refusal := held.add(body)) is not None:
                    raise refusal
                request = self._request(received, model, body, options)
            submitted = await self._submitter.submit(request)
            await outputs.expect(submitted.job)
            if grant is not None:
                grant.accepted(len(body))
        finally:
            held.release()
            if grant is not None:
                grant.cancel()
        self._note(received, request, submitted.job, len(body))
        job = submitted.job.id.hex()
        headers = {
            f"{_HEADER}outputlocation": store.location(async_inference.output_key(job)),
            f"{_HEADER}failurelocation": store.location(async_inference.failure_key(job)),
            "x-tidegate-job": job,
        }
        document = {"InferenceId": async_inference.inference_id(wanted_id, job)}
        return Response(orjson.dumps(document), 202, headers, "application/json")

    def _request(self, received: Received, model: str, body: bytes, options: JobOptions) -> JobRequest:
        kind = received.header(f"{_HEADER}content-type") or received.header("content-type")
        given = TypedBody(kind, received.header(f"{_HEADER}accept"), body)
        caller = principal()
        request = self._submitter.check(
            model,
            received.header(TARGET_VARIANT).removeprefix("v"),
            given.decode,
            options,
            caller,
            trace=self._log.begin(telemetry.request_id.get().encode("latin-1", "replace"), received.headers),
            origin=lambda: Origin(received.headers, caller.id, dict),
        )
        return replace(request, ask=request.ask | AnswerPlan(given.wanted, given.rows, given.whole).to_ask())

    def _note(self, received: Received, request: JobRequest, job: Job, size: int) -> None:
        """Log the accepted job, and export its trace."""
        total, name, route = time.perf_counter() - received.started, job.id.hex(), request.route
        if self._log.take():
            self._log.accepted(
                job.endpoint, route.name, route.version, name, principal(), telemetry.request_id.get(),
                status=202, received=size, sent=0, headers=received.headers, total=total,
            )  # fmt: skip
        self._log.trace_job(
            request.trace,
            received.headers,
            job.endpoint,
            route.name,
            name,
            status=202,
            started=received.started,
        )
