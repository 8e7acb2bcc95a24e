"""Routes that upload and download artifacts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from services.registry.api.bodies import ArtifactInfo
from services.registry.api.dependencies import ArtifactsDep
from services.registry.api.replicas import own_artifact
from tidegate.kernel.protocol.models import Digest

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])
# A replica's token opens only these routes, and only for the replica's own artifact.
reading = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], dependencies=[Depends(own_artifact)])

_RAW = {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}}


@router.put("", status_code=201, openapi_extra=_RAW)
async def upload(
    artifacts: ArtifactsDep,
    request: Request,
    content_length: Annotated[int | None, Header(ge=0)] = None,
    sha256: Annotated[Digest | None, Query(description="Compared with the bytes that arrive.")] = None,
    filename: Annotated[str | None, Query(description="For the sender's own logs; not stored.")] = None,
) -> ArtifactInfo:
    """Store the request's body under its sha256, while it arrives. The same bytes are stored once.

    Return 413 as soon as the limit is passed. An artifact that no version uses within an hour is deleted.
    """
    stored = await artifacts.upload(request.stream(), announced=content_length, expected=sha256)
    return ArtifactInfo(sha256=stored.sha256, size=stored.size)


@reading.head("/{sha256}", response_class=Response)
async def head(artifacts: ArtifactsDep, sha256: str) -> Response:
    """Return 200 and the size if an artifact is stored, else 404."""
    return Response(headers=_headers(sha256, await artifacts.size(sha256)))


@reading.get("/{sha256}", response_class=StreamingResponse)
async def download(artifacts: ArtifactsDep, sha256: str) -> StreamingResponse:
    """Return the bytes of an artifact as a stream. The reader must check the digest."""
    headers = _headers(sha256, await artifacts.size(sha256))
    pieces = await artifacts.store.read(sha256)
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


def _headers(sha256: str, size: int) -> dict[str, str]:
    return {
        "Content-Length": str(size),
        "ETag": f'"{sha256}"',
        "Cache-Control": "private, max-age=31536000, immutable",
    }
