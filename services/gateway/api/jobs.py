"""The HTTP API of accepted jobs: status, result, cancel, events, list, retry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, get_args

import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response
from starlette.types import Send

from services.gateway.api.body_limits import Headers
from services.gateway.api.cancellable_response import EVENT_STREAM, CancellableResponse
from services.gateway.api.compression import HttpResponse, deliver
from services.gateway.api.job_http import id_in_path, json_response, page, read_cursor, request_principal
from services.gateway.api.job_responses import JobResponses
from services.gateway.application.access import Access
from services.gateway.application.jobs.submission import JobService
from services.gateway.domain import job_options
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.access import ADMIN
from tidegate.kernel.protocol.jobs import TERMINAL, Job, JobEvent, State

MAX_LIST = 1000
KEEPALIVE_S = 15.0
STATUSES: tuple[State, ...] = tuple(state for state in get_args(State) if state != "accepting")


class JobHandlers:
    """The paths below ``/v1/jobs``. A job is seen by the principal it belongs to, and by the scope admin."""

    def __init__(self, jobs: JobService, answers: JobResponses, access: Access) -> None:
        self._jobs = jobs
        self._access = access
        self._answers = answers
        self.router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])
        add = self.router.add_api_route
        add("", self.list, methods=["GET"])
        add("/{id}", self.status, methods=["GET"])
        add("/{id}", self.cancel, methods=["DELETE"])
        add("/{id}/result", self.result, methods=["GET"])
        add("/{id}/events", self.events, methods=["GET"])
        add("/{id}/retry", self.retry, methods=["POST"], status_code=202)

    async def list(
        self,
        status: str | None = None,
        endpoint: str | None = None,
        deployment: str | None = None,
        batch: str | None = None,
        principal: str | None = None,
        cursor: str | None = None,
        limit: int = Query(100, ge=1, le=MAX_LIST),
    ) -> Response:
        """Jobs, newest first. ``cursor``: the ``next`` of the page before."""
        who = request_principal()
        if not who.may(ADMIN):
            principal = who.id
        before = read_cursor(cursor)
        if status is not None and status not in STATUSES:
            raise BadRequest(f"status must be one of {', '.join(STATUSES)}, got {status[:40]!r}")
        found = await self._jobs.store.list(
            state=status,
            deployment=deployment,
            endpoint=endpoint,
            principal=principal,
            batch=batch,
            before=before,
            limit=limit,
        )
        return page([self._answers.document(job, None) for job in found], limit)

    async def status(self, request: Request, id: str) -> Response:
        """A job as it is, or with ``Prefer: wait=N`` once it is over."""
        job = await self._awaited(request, await self._find(id))
        return json_response(await self._document(job))

    async def cancel(self, id: str) -> Response:
        """End a job: one that waits never runs, one that runs is cancelled. Gives it as it is then."""
        return json_response(await self._document(await self._jobs.cancel(await self._find(id))))

    async def result(self, request: Request, id: str) -> Response:
        """The result, as JSON or binary as asked; 202 while the job is not over, a failure's own code.

        ``Prefer: wait=N`` waits for it.
        """
        job = await self._awaited(request, await self._find(id))
        if not job.terminal:
            return json_response(await self._document(job), 202, {"Retry-After": "1"})
        headers: Headers = dict(request.scope["headers"])
        rid = telemetry.request_id.get().encode("latin-1", "replace")
        return await packed(await self._answers.result(job, headers, rid), headers)

    async def events(self, request: Request, id: str) -> Response:
        """Everything that happens to a job as server-sent events, up to its end; resumes by Last-Event-ID."""
        job = await self._find(id)
        after = last_event_id(request.headers.get("last-event-id"))
        if job.terminal and not await self._jobs.store.log(job.id, after):
            return Response(status_code=204)  # tells an EventSource that there is nothing to come back for
        return CancellableResponse(lambda send: self._tell(job.id, after, send), lambda: None)

    async def retry(self, id: str) -> Response:
        """A new job with the request of one that failed."""
        before = await self._find(id)
        grant = self._access.admit(request_principal(), before.endpoint)
        try:
            submitted = await self._jobs.retry(before)
        finally:
            if grant is not None:
                grant.cancel()  # what it uses counts at the end of the job
        job = submitted.job
        document = self._answers.document(job, submitted.position)
        return json_response(document, 202, {"Location": f"/v1/jobs/{job.id.hex()}"})

    async def _find(self, id: str) -> Job:
        who = request_principal()
        return await self._jobs.find(id_in_path(id, "job"), who)

    async def _awaited(self, request: Request, job: Job) -> Job:
        header = request.headers.get("prefer")
        prefer = job_options.preference(header.encode("latin-1")) if header is not None else None
        if prefer is None or not prefer.wait_s or job.terminal:
            return job
        return await self._jobs.wait(job.id, prefer.wait_s)

    async def _document(self, job: Job) -> dict[str, Any]:
        return self._answers.document(job, await self._jobs.position(job))

    async def _tell(self, id_: bytes, after: int, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        async with aclosing(self._happenings(id_, after)) as happenings:
            async for event in happenings:
                await send({"type": "http.response.body", "body": shown(event), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _happenings(self, id_: bytes, after: int) -> AsyncGenerator[JobEvent | None]:
        """The events behind number ``after``, to the last one; None now and then, when there is nothing."""
        async with self._jobs.store.watch().changes(id_) as notices:
            while True:
                for event in await self._jobs.store.log(id_, after):
                    after = event.seq
                    if event.state == "queued":
                        continue  # to the outside it has been that from the first
                    yield event
                    if event.state in TERMINAL:
                        return
                try:
                    await asyncio.wait_for(anext(notices), KEEPALIVE_S)
                except TimeoutError:
                    yield None
                    if await self._jobs.store.get(id_) is None:
                        return


def last_event_id(found: str | None) -> int:
    """The number of the last event that a client has seen; 0: none. Raises BadRequest."""
    if not found:
        return 0
    if not found.isdecimal() or len(found) > 18:
        raise BadRequest(f"Last-Event-ID must be the id of an event, got {found[:40]!r}")
    return int(found)


def shown(event: JobEvent | None) -> bytes:
    """An event in the form of text/event-stream; None is a comment that keeps the connection open."""
    if event is None:
        return b": still here\n\n"
    name = event.public()["status"]
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.seq, name.encode(), orjson.dumps(event.public()))


async def packed(answer: HttpResponse, headers: Headers) -> Response:
    """The framework's response for one of ours, compressed if its caller wants that."""
    future: asyncio.Future[HttpResponse] = asyncio.get_running_loop().create_future()
    deliver(answer, headers, future.set_result)
    done = await future
    response = Response(b"".join((done.body, *done.tail)), done.status)
    response.raw_headers = [(name, value) for name, value in done.headers if name != b"x-request-id"]
    return response
