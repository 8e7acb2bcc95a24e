"""Serve OpenAI's files: upload, list, status, content, delete."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Annotated, Any, ParamSpec

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from services.gateway.api.body_limits import BodyLimits, UploadMemory
from services.gateway.api.job_http import json_response, request_principal
from services.gateway.api.llm.openai_errors import openai_response
from services.gateway.application.openai.files import FileService, FileUpload
from services.gateway.domain.multipart import MultipartReader, PartBegin, PartData, PartEnd, boundary_of
from services.gateway.domain.openai.files import (
    StoredFile,
    check_filename,
    check_purpose,
    file_name,
    kept_s,
    read_file_id,
)
from tidegate.kernel.errors import BadRequest, TidegateError
from tidegate.kernel.protocol.access import ADMIN, ANONYMOUS

# The most bytes of a form field other than the file, for example of ``purpose``.
FIELD_BYTES = 1024
MAX_LIST = 10_000
P = ParamSpec("P")
Handler = Callable[P, Coroutine[Any, Any, Response]]


def in_openais_words(handler: Handler[P]) -> Handler[P]:
    """Return a handler whose errors are in OpenAI's format."""

    @wraps(handler)
    async def handled(*args: P.args, **kwargs: P.kwargs) -> Response:
        try:
            return await handler(*args, **kwargs)
        except TidegateError as error:
            return openai_response(error)

    return handled


class OpenAiFileRoutes:
    """The routes of ``/v1/files``."""

    def __init__(self, files: FileService, limits: BodyLimits) -> None:
        self._files = files
        self._limits = limits
        self.router = APIRouter(prefix="/v1/files", tags=["OpenAI"])
        add = self.router.add_api_route
        add("", in_openais_words(self.create), methods=["POST"], response_model=None)
        add("", in_openais_words(self.list), methods=["GET"], response_model=None)
        add("/{id}", in_openais_words(self.status), methods=["GET"], response_model=None)
        add("/{id}", in_openais_words(self.delete), methods=["DELETE"], response_model=None)
        add("/{id}/content", in_openais_words(self.content), methods=["GET"], response_model=None)

    async def create(self, request: Request) -> Response:
        """Upload a file, as multipart/form-data with ``purpose`` and ``file``."""
        principal = request_principal()
        reader = MultipartReader(boundary_of(request.headers.get("content-type", "")))
        memory = UploadMemory(self._limits, known=principal is not ANONYMOUS)
        upload = await self._files.begin(principal, memory.resize)
        form = _Form(upload)
        try:
            async for data in request.stream():
                for event in reader.feed(data):
                    await form.take(event)
            reader.end()
            fields = form.fields
            keep_s = kept_s(
                fields.get("expires_after[anchor]"),
                fields.get("expires_after[seconds]"),
                self._files.limits.keep_s,
            )
            purpose = check_purpose(fields.get("purpose"))
            file = await upload.finish(form.checked_filename(), purpose, keep_s)
        except ClientDisconnect:
            await upload.abort()
            raise BadRequest("the upload ended before the file was complete: send it again") from None
        except BaseException:
            await upload.abort()
            raise
        finally:
            memory.release()
        return json_response(file.public())

    async def list(
        self,
        purpose: str | None = None,
        after: str | None = None,
        order: str = "desc",
        limit: Annotated[int, Query(ge=1, le=MAX_LIST)] = MAX_LIST,
    ) -> Response:
        """List the caller's files. A caller with the scope admin gets the files of all callers."""
        caller = request_principal()
        if order not in ("asc", "desc"):
            raise BadRequest(f"order must be asc or desc, got {order[:40]!r}")
        before = None if after is None else read_file_id(after)
        owner = None if caller.may(ADMIN) else caller.id
        found = await self._files.latest(
            owner, before, limit + 1, purpose=purpose, oldest_first=order == "asc"
        )
        return json_response(listed([file.public() for file in found[:limit]], more=len(found) > limit))

    async def status(self, id: str) -> Response:
        """Return a file's size, times and purpose."""
        return json_response((await self._find(id)).public())

    async def content(self, id: str) -> Response:
        """Return the bytes of a file."""
        file = await self._find(id)
        return StreamingResponse(
            self._files.content(file),
            headers={"content-length": str(file.size)},
            media_type="application/octet-stream",
        )

    async def delete(self, id: str) -> Response:
        """Delete a file. The answer is 409 while a batch reads it."""
        file = await self._find(id)
        await self._files.delete(file)
        return json_response({"id": file_name(file.id), "object": "file", "deleted": True})

    async def _find(self, id: str) -> StoredFile:
        return await self._files.find(read_file_id(id), request_principal())


class _Form:
    """The form of an upload. Its file goes to the blob store, and its other fields stay in memory."""

    def __init__(self, upload: FileUpload) -> None:
        self._upload = upload
        self._part = ""
        self._field = b""
        self._filename: str | None = None
        self._has_file = False
        self.fields: dict[str, str] = {}

    async def take(self, event: PartBegin | PartData | PartEnd) -> None:
        """Take the next event of the form.

        Raises BadRequest if the form has two files, or if a field is too large. Also raises the errors of
        :meth:`FileUpload.write`.
        """
        if isinstance(event, PartBegin):
            self._part, self._field = event.name, b""
            if event.name == "file":
                if self._has_file:
                    raise BadRequest("the form has more than one file: upload one file at a time")
                self._has_file, self._filename = True, event.filename
        elif isinstance(event, PartEnd):
            if self._part != "file":
                self.fields[self._part] = self._field.decode("utf-8", "replace").strip()
        elif self._part == "file":
            await self._upload.write(event.data)
        else:
            self._field += event.data
            if len(self._field) > FIELD_BYTES:
                raise BadRequest(f"the form's field {self._part[:40]!r} has more than {FIELD_BYTES} bytes")

    def checked_filename(self) -> str:
        """Return the file's name. Raises BadRequest if the form has no file."""
        if not self._has_file:
            raise BadRequest("the form has no field 'file' with the file")
        return check_filename(self._filename)


def listed(items: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """Return a page of a list in OpenAI's format. ``more``: True if other items follow the page."""
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": more,
    }
