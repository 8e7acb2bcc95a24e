"""Routes that upload and download artifacts."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from services.registry.api.bodies import ArtifactInfo
from services.registry.api.dependencies import ArtifactsDep
from services.registry.api.replicas import is_replica, own_artifact
from tidegate.kernel.protocol.models import Digest

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])
# A replica may use these routes, but only for its own artifact.
reading = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], dependencies=[Depends(own_artifact)])

_FROM = re.compile(r"bytes=([0-9]{1,18})-")
_RAW = {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}}


@router.put("", status_code=201, openapi_extra=_RAW)
async def upload(
    artifacts: ArtifactsDep,
    request: Request,
    content_length: Annotated[int | None, Header(ge=0)] = None,
    sha256: Annotated[Digest | None, Query(description="sha256 that the arriving bytes must have.")] = None,
    filename: Annotated[
        str | None, Query(description=("A name for the sender's own logs. The registry does not store it."))
    ] = None,
) -> ArtifactInfo:
    """Store the request's body as an artifact. The artifact is identified by the sha256 of the body.

    The body is written to the store while it arrives. The same bytes are stored only once. Return 413 as soon
    as the body exceeds the limit. If no version uses the artifact within ``TIDEGATE_PENDING_ARTIFACT_S``
    (default: an hour), the artifact is deleted.
    """
    stored = await artifacts.upload(request.stream(), announced=content_length, expected=sha256)
    return ArtifactInfo(sha256=stored.sha256, size=stored.size)


@reading.head("/{sha256}", response_class=Response)
async def head(artifacts: ArtifactsDep, sha256: str) -> Response:
    """Return 200 and the size if an artifact is stored, else 404."""
    return Response(headers=_headers(sha256, await artifacts.size(sha256)))


@reading.get(
    "/{sha256}",
    response_class=StreamingResponse,
    responses={
        206: {"description": "The bytes from byte N to the end, for a Range of the form `bytes=N-`."},
        304: {"description": "The caller already has these bytes: their ETag is in `If-None-Match`."},
        307: {"description": "Only for replicas: `Location` is a signed URL of the artifact store."},
        416: {"description": "The Range begins after the last byte."},
    },
)
async def download(
    artifacts: ArtifactsDep,
    sha256: str,
    range_: Annotated[
        str | None, Header(alias="Range", description="`bytes=N-`; other forms are ignored.")
    ] = None,
    known: Annotated[str | None, Header(alias="If-None-Match")] = None,
    redirect: Annotated[bool, Query(description="Allow to redirect a replica to the artifact store.")] = True,
) -> Response:
    """Return the bytes of an artifact as a stream. The caller must check the sha256.

    A replica is redirected to a URL of the artifact store if ``TIDEGATE_PRESIGNED_DOWNLOADS`` is set, the
    store is on S3, and ``redirect`` is True.
    """
    size = await artifacts.size(sha256)
    headers = _headers(sha256, size)
    if known is not None and f'"{sha256}"' in known:
        del headers["Content-Length"]
        return Response(status_code=304, headers=headers)
    if redirect and is_replica() and (url := await artifacts.signed_url(sha256)) is not None:
        return RedirectResponse(url, 307, {"Cache-Control": "no-store"})
    start = _start_of(range_)
    if start is None:
        pieces = await artifacts.store.read(sha256)
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)
    if start >= size:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    headers |= {"Content-Length": str(size - start), "Content-Range": f"bytes {start}-{size - 1}/{size}"}
    pieces = await artifacts.store.read(sha256, start)
    return StreamingResponse(pieces, 206, headers, "application/octet-stream")


def _start_of(range_: str | None) -> int | None:
    """Return N for a Range of the form ``bytes=N-``; None for any other Range, which is ignored."""
    found = _FROM.fullmatch(range_ or "")
    return None if found is None else int(found[1])


def _headers(sha256: str, size: int) -> dict[str, str]:
    return {
        "Content-Length": str(size),
        "Accept-Ranges": "bytes",
        "ETag": f'"{sha256}"',
        "Cache-Control": "private, max-age=31536000, immutable",
    }
