"""Routes of uploads that can be continued after a lost connection or a restart.

The caller opens an upload with POST, which states the sha256 and the size. The caller then sends parts with
PATCH, each at the offset that the last response states. At the end, the caller repeats GET until the upload's
state is ``stored`` or ``failed``.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from pydantic import Field
from starlette.requests import ClientDisconnect

from services.registry.api.bodies import Items
from services.registry.api.dependencies import UploadsDep
from services.registry.domain.uploads import PART_BYTES, State, Upload
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Digest, Noun
from tidegate.kernel.service import caller
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/uploads", tags=["artifacts"], route_class=JsonRoute)

_RAW = {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}}
_TOO_MANY: dict[str, Any] = {
    "description": "The caller has too many unfinished uploads, or too many bytes in them.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


class NewUpload(Noun):
    """An upload to open."""

    sha256: Digest = Field(description="sha256 of the whole file.")
    size: int = Field(ge=1, le=2**63 - 1, description="Bytes of the whole file.")


class UploadInfo(Noun):
    """An upload."""

    id: str
    sha256: Digest
    size: int = Field(description="Bytes of the whole file.")
    offset: int = Field(description="Number of bytes that are stored; the next part begins at this offset.")
    state: State = Field(description="State of the upload: open, verifying, stored or failed.")
    problem: str = Field("", description="Why the upload failed.")
    part_bytes: int = Field(PART_BYTES, description="Recommended size of a part.")


@router.post("", status_code=201, responses={200: {"model": UploadInfo}, 429: _TOO_MANY})
async def open_upload(uploads: UploadsDep, body: NewUpload, response: Response) -> UploadInfo:
    """Open an upload. If the caller has an unfinished upload of the same bytes, return 200 and that upload.

    If the artifact is stored already, return 200 with the state ``stored``. Then no upload is needed.
    """
    upload, new = await uploads.open(_owner(), body.sha256, body.size)
    response.status_code = 201 if new else 200
    return _info(upload, response)


@router.get("")
async def list_uploads(uploads: UploadsDep) -> Items[UploadInfo]:
    """Return the caller's uploads, oldest first."""
    return Items(items=[_info(upload) for upload in await uploads.of(_owner())])


@router.get("/{id_}")
async def get_upload(uploads: UploadsDep, id_: str, response: Response) -> UploadInfo:
    """Return an upload. While its bytes are being checked, wait up to ten seconds for the result."""
    return _info(await uploads.get(_owner(), id_), response)


@router.patch("/{id_}", openapi_extra=_RAW)
async def append(
    uploads: UploadsDep,
    id_: str,
    request: Request,
    response: Response,
    upload_offset: Annotated[int, Header(ge=0, description="Number of bytes that are already stored.")],
    content_length: Annotated[int | None, Header(ge=0)] = None,
) -> UploadInfo:
    """Append the request's body to an upload.

    If the body does not begin at the upload's ``offset``, return 409 ``wrong_offset``. The body is stored in
    parts of about 8 MiB. A last part of less than 1 MiB is dropped, unless it ends the file. So the caller
    must begin the next request at the ``offset`` in the response.
    """
    try:
        upload = await uploads.append(_owner(), id_, upload_offset, request.stream(), content_length)
    except ClientDisconnect:
        raise BadRequest("The sender closed the connection before the part was complete.") from None
    return _info(upload, response)


@router.delete("/{id_}", status_code=204)
async def abort(uploads: UploadsDep, id_: str) -> None:
    """Delete an upload and its bytes."""
    await uploads.abort(_owner(), id_)


def _owner() -> str:
    return caller.current.get().principal.id


def _info(upload: Upload, response: Response | None = None) -> UploadInfo:
    if response is not None:
        response.headers["Upload-Offset"] = str(upload.received)
    return UploadInfo(
        id=upload.id,
        sha256=upload.sha256,
        size=upload.size,
        offset=upload.received,
        state=upload.state,
        problem=upload.problem,
    )
