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
from services.gateway.api.job_http import (
    as_response,
    id_in_path,
    json_response,
    page,
    read_cursor,
    request_principal,
)
from services.gateway.api.job_responses import JobResponses
from services.gateway.application.access import Access
from services.gateway.application.jobs.submission import JobSubmitter
from services.gateway.application.jobs.tracking import JobTracker
from services.gateway.domain import job_options
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.access import ADMIN
from tidegate.kernel.protocol.jobs import TERMINAL, Job, JobEvent, State

MAX_LIST = 1000
KEEPALIVE_S = 15.0
STATUSES: tuple[State, ...] = tuple(state for state in get_args(State) if state != "accepting")


class JobHandlers:
    """The handlers of ``/v1/jobs``. Only a job's principal and callers with the scope admin see the job."""

    def __init__(
        self, submitter: JobSubmitter, tracker: JobTracker, responses: JobResponses, access: Access
    ) -> None:
        self._submitter = submitter
        self._tracker = tracker
        self._access = access
        self._responses = responses
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
        """List jobs, newest first. ``cursor``: the ``next`` of the previous page."""
        caller = request_principal()
        if not caller.may(ADMIN):
            principal = caller.id
        before = read_cursor(cursor)
        if status is not None and status not in STATUSES:
            raise BadRequest(f"status must be one of {', '.join(STATUSES)}, got {status[:40]!r}")
        jobs = await self._tracker.store.list(
            state=status,
            deployment=deployment,
            endpoint=endpoint,
            principal=principal,
            batch=batch,
            before=before,
            limit=limit,
        )
        return page([self._responses.document(job, None) for job in jobs], limit)

    async def status(self, request: Request, id: str) -> Response:
        """Return a job. With ``Prefer: wait=N``, wait up to N seconds until it has ended."""
        job = await self._awaited(request, await self._find(id))
        return json_response(await self._document(job))

    async def cancel(self, id: str) -> Response:
        """Cancel a job and return it. A queued job then never runs, and a running job is stopped."""
        return json_response(await self._document(await self._tracker.cancel(await self._find(id))))

    async def result(self, request: Request, id: str) -> Response:
        """Return the result as JSON or binary. The status is 202 before the job has ended.

        If the job failed, return its error. With ``Prefer: wait=N``, wait up to N seconds for the result.
        """
        job = await self._awaited(request, await self._find(id))
        if not job.terminal:
            return json_response(await self._document(job), 202, {"Retry-After": "1"})
        headers: Headers = dict(request.scope["headers"])
        rid = telemetry.request_id.get().encode("latin-1", "replace")
        return await as_response(await self._responses.result(job, headers, rid), headers)

    async def events(self, request: Request, id: str) -> Response:
        """Stream a job's events until it ends, as server-sent events.

        The header ``Last-Event-ID`` names the last event that the client has seen. If it is present, send
        only later events.
        """
        job = await self._find(id)
        after = last_event_id(request.headers.get("last-event-id"))
        if job.terminal and not await self._tracker.store.log(job.id, after):
            return Response(status_code=204)  # this status stops an EventSource from reconnecting
        return CancellableResponse(lambda send: self._send_events(job.id, after, send), lambda: None)

    async def retry(self, id: str) -> Response:
        """Submit a failed job's request again, as a new job."""
        before = await self._find(id)
        grant = self._access.admit(request_principal(), before.endpoint)
        try:
            submitted = await self._submitter.retry(before)
        finally:
            if grant is not None:
                grant.cancel()  # the usage of a job is counted when it ends
        job = submitted.job
        document = self._responses.document(job, submitted.position)
        return json_response(document, 202, {"Location": f"/v1/jobs/{job.id.hex()}"})

    async def _find(self, id: str) -> Job:
        return await self._tracker.find(id_in_path(id, "job"), request_principal())

    async def _awaited(self, request: Request, job: Job) -> Job:
        header = request.headers.get("prefer")
        prefer = job_options.preference(header.encode("latin-1")) if header is not None else None
        if prefer is None or not prefer.wait_s or job.terminal:
            return job
        return await self._tracker.wait(job.id, prefer.wait_s)

    async def _document(self, job: Job) -> dict[str, Any]:
        return self._responses.document(job, await self._tracker.position(job))

    async def _send_events(self, id_: bytes, after: int, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        async with aclosing(self._events_after(id_, after)) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": encode_event(event), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events_after(self, id_: bytes, after: int) -> AsyncGenerator[JobEvent | None]:
        """Yield the events after number ``after`` until the job ends. Yield None as a keepalive."""
        async with self._tracker.store.watch().changes(id_) as notices:
            while True:
                for event in await self._tracker.store.log(id_, after):
                    after = event.seq
                    if event.state == "queued":
                        continue  # callers see ``accepting`` as "queued", so they have this event already
                    yield event
                    if event.state in TERMINAL:
                        return
                try:
                    await asyncio.wait_for(anext(notices), KEEPALIVE_S)
                except TimeoutError:
                    yield None
                    if await self._tracker.store.get(id_) is None:
                        return


def last_event_id(header: str | None) -> int:
    """Return the number of the last event that a client has seen; 0 means none.

    Raises BadRequest if ``header`` is not such a number.
    """
    if not header:
        return 0
    if not header.isdecimal() or len(header) > 18:
        raise BadRequest(f"Last-Event-ID must be the id of an event, got {header[:40]!r}")
    return int(header)


def encode_event(event: JobEvent | None) -> bytes:
    """Return an event as text/event-stream. For None, return a comment that keeps the connection open."""
    if event is None:
        return b": still here\n\n"
    name = event.public()["status"]
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.seq, name.encode(), orjson.dumps(event.public()))
