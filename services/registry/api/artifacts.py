"""Upload and download of artifacts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from services.registry.api.bodies import ArtifactInfo, registrar
from services.registry.api.replicas import own_artifact
from services.registry.application.registrar import Registrar
from tidegate.kernel.errors import NotFound
from tidegate.kernel.protocol.models import Digest

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])
# What a replica may do with its token, for its own artifact.
reading = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], dependencies=[Depends(own_artifact)])

Core = Annotated[Registrar, Depends(registrar)]
_RAW = {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}}


@router.put("", status_code=201, openapi_extra=_RAW)
async def upload(
    core: Core,
    request: Request,
    content_length: Annotated[int | None, Header(ge=0)] = None,
    sha256: Annotated[Digest | None, Query(description="Checked against what arrives.")] = None,
    filename: Annotated[str | None, Query(description="For the sender's own logs; not stored.")] = None,
) -> ArtifactInfo:
    """Store the request's body, streamed, under its sha256. The same bytes are stored once.

    413 as soon as the limit is passed. An artifact that no version names within an hour is deleted.
    """
    stored = await core.upload(request.stream(), announced=content_length, expected=sha256)
    return ArtifactInfo(sha256=stored.sha256, size=stored.size)


@reading.head("/{sha256}", response_class=Response)
async def head(core: Core, sha256: str) -> Response:
    """Return 200 and the size if an artifact is stored, else 404."""
    return Response(headers=await _headers(core, sha256))


@reading.get("/{sha256}", response_class=StreamingResponse)
async def download(core: Core, sha256: str) -> StreamingResponse:
    """Return the bytes of an artifact, streamed. The reader checks the digest."""
    headers = await _headers(core, sha256)
    pieces = await core.artifacts.read(sha256)
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


async def _headers(core: Registrar, sha256: str) -> dict[str, str]:
    async with core.database.read() as reader:
        size = await reader.artifact_size(sha256)
    if size is None:
        raise NotFound(f"No artifact {sha256[:80]!r} is stored here.")
    return {
        "Content-Length": str(size),
        "ETag": f'"{sha256}"',
        "Cache-Control": "private, max-age=31536000, immutable",
    }
