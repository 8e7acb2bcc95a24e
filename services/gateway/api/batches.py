"""The HTTP API of batches: upload a file of requests, read its progress, download the results.

OpenAI's batches have the same paths. A ``POST`` creates an OpenAI batch if its body is a JSON object with
``input_file_id``. The id of an OpenAI batch begins with ``batch_``. The response to a list request has both
kinds of batches: Tidegate's batches with the fields ``items`` and ``next``, and OpenAI's batches with the
fields ``data`` and ``has_more``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from services.gateway.adapters.batch_files import LineSplitter
from services.gateway.api.body_limits import BodyLimits, UploadMemory
from services.gateway.api.decompression import Decompressor, encoding_of
from services.gateway.api.job_http import id_in_path, json_response, page_of, read_cursor, request_principal
from services.gateway.api.openai.batches import OpenAiBatchHandlers
from services.gateway.api.openai.files import listed
from services.gateway.application.jobs.batches import BatchService
from services.gateway.domain import job_options
from services.gateway.domain.batches import Batch
from services.gateway.domain.job_options import JobOptions
from services.gateway.domain.openai.batches import PREFIX, is_batch_request
from tidegate.kernel.errors import BadRequest, NotFound, TidegateError
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.protocol.access import ADMIN, ANONYMOUS

# At most this many bytes are split into lines at a time. There is a limit because short lines need twenty
# times their size in memory.
PIECE = 64 * 1024
# A JSON body with more bytes than this does not create a batch of OpenAI's API. For such a batch, the largest
# field of the body is the metadata, of at most 9 KB.
WISH_BYTES = 64 * 1024


class BatchHandlers:
    """The handlers of ``/v1/batches``.

    ``limits``: the memory budget of uploads. ``file_bytes``, ``line_bytes``, ``lines``: the limits
    on the size of a file, the size of a line, and the number of lines in a file.
    """

    def __init__(
        self,
        batches: BatchService,
        openai: OpenAiBatchHandlers,
        limits: BodyLimits,
        *,
        file_bytes: int,
        line_bytes: int,
        lines: int,
    ) -> None:
        self._batches = batches
        self._openai = openai
        self._limits = limits
        self._file_bytes = file_bytes
        self._line_bytes = line_bytes
        self._lines = lines
        self.router = APIRouter(prefix="/v1/batches", tags=["Batches"])
        add = self.router.add_api_route
        add("", self.create, methods=["POST"], status_code=202)
        add("", self.list, methods=["GET"])
        add("/{id}", self.status, methods=["GET"])
        add("/{id}", self.cancel, methods=["DELETE"])
        add("/{id}/cancel", self.cancel, methods=["POST"], name="cancel_by_post")
        add("/{id}/results", self.results, methods=["GET"])

    async def create(
        self,
        request: Request,
        model: str = "",
        version: str = "",
        priority: str | None = None,
        ttl_s: float | None = None,
    ) -> Response:
        """Submit a file with one request on each line (JSONL), as a batch.

        A line may override the parameters of the batch for its own request. A body that is a JSON object with
        ``input_file_id`` creates a batch of OpenAI's API.
        """
        principal = request_principal()
        body: AsyncIterator[bytes] = request.stream()
        if _may_be_wish(request):
            begun, document = await _begin(body)
            if is_batch_request(document):
                return await self._openai.create(document)
            body = _continued(begun, body)
        options = job_options.from_fields({"priority": priority, "ttl_s": ttl_s}, JobOptions(level="low"))
        splitter = LineSplitter(line_bytes=self._line_bytes, total_bytes=self._file_bytes, lines=self._lines)
        memory = UploadMemory(self._limits, known=principal is not ANONYMOUS)
        try:
            batch = await self._batches.create(
                _uncompressed(request, body), splitter, model, version, options, principal, memory.resize
            )
        except ClientDisconnect:
            raise BadRequest("the upload ended before the file was complete: send it again") from None
        finally:
            memory.release()
        return _response(batch, 202, {"Location": f"/v1/batches/{batch.id.hex()}"})

    async def list(
        self,
        principal: str | None = None,
        cursor: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """List batches, newest first. ``cursor``: the ``next`` of the previous page.

        In the response, ``data`` has the batches of OpenAI's API. ``after``: the last id in ``data`` of the
        previous page.
        """
        caller = request_principal()
        owner = principal if caller.may(ADMIN) else caller.id
        before, found = read_cursor(cursor), list[Batch]()
        if after is None:
            found = await self._batches.latest(owner, before, limit)
        own = page_of([batch.public() for batch in found], limit)
        theirs = await self._openai.page(owner, after, limit) if cursor is None else listed([], more=False)
        return json_response(own | theirs)

    async def status(self, id: str) -> Response:
        """Return a batch and its progress."""
        if id.startswith(PREFIX):
            return await self._openai.status(id)
        return _response(await self._find(id))

    async def cancel(self, id: str) -> Response:
        """Cancel the unfinished lines of a batch."""
        if id.startswith(PREFIX):
            return await self._openai.cancel(id)
        return _response(await self._batches.cancel(await self._find(id)), 202)

    async def results(self, id: str, partial: bool = False) -> Response:
        """Return the results in the order of the requests (JSONL), or 202 before the batch has ended.

        With ``partial``, return the results that exist so far.
        """
        if id.startswith(PREFIX):
            raise NotFound(
                f"the results of {id[:64]} are in files: GET /v1/files/ID/content, where ID is the batch's "
                "output_file_id or error_file_id"
            )
        batch = await self._find(id)
        if not batch.over and not partial:
            return _response(batch, 202, {"Retry-After": "5"})
        return StreamingResponse(self._batches.results(batch), media_type="application/jsonl")

    async def _find(self, id: str) -> Batch:
        return await self._batches.find(id_in_path(id, "batch"), request_principal())


def _response(batch: Batch, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return json_response(batch.public(), status, headers)


def _may_be_wish(request: Request) -> bool:
    """Return True if the body may create a batch of OpenAI's API.

    Such a body is JSON, and it is not compressed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" and "content-encoding" not in request.headers


async def _begin(body: AsyncIterator[bytes]) -> tuple[bytes, Any]:
    """Read a body until it ends or has more than ``WISH_BYTES`` bytes.

    Return the bytes that were read, and the decoded JSON. The JSON is None if the body is too large or is not
    JSON.
    """
    begun = b""
    async for data in body:
        begun += data
        if len(begun) > WISH_BYTES:
            return begun, None
    try:
        return begun, bounded_json.loads(begun)
    except TidegateError:
        return begun, None


async def _continued(begun: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    yield begun
    async for data in rest:
        yield data


async def _uncompressed(request: Request, body: AsyncIterator[bytes] | None = None) -> AsyncGenerator[bytes]:
    """Yield the decompressed body in pieces of bounded size.

    Raise BadRequest if the body cannot be decompressed.

    ``body``: an iterator over the whole body. If it is None, the body is read from ``request``.
    """
    encoding = encoding_of(dict(request.scope["headers"]))
    inflater = Decompressor(encoding) if encoding else None
    async for data in request.stream() if body is None else body:
        for piece in (data,) if inflater is None else inflater.feed(data):
            for at in range(0, len(piece), PIECE):
                yield piece[at : at + PIECE]
    if inflater is not None:
        inflater.end()
