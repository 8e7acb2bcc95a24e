"""Routes of drift and quality."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from tidegate.kernel import telemetry
from tidegate.kernel.protocol.access import OPERATE
from tidegate.kernel.service import caller

log = telemetry.logger(__name__)

router = APIRouter(prefix="/v1/drift", tags=["drift"])
quality_router = APIRouter(prefix="/v1/quality", tags=["quality"])


@router.get("")
async def all_drift(request: Request) -> dict[str, Any]:
    """Return the drift of every deployed version, with its worst columns."""
    found: dict[str, Any] = request.app.state.drift.snapshot()
    return found


@router.get("/{name}")
async def drift(request: Request, name: str) -> dict[str, Any]:
    """Return the drift of the versions behind an endpoint, a Deployment or a model, with all columns."""
    found: dict[str, Any] = request.app.state.drift.shown(name)
    return found


@router.get("/{name}/rows", response_class=StreamingResponse)
async def rows(request: Request, name: str) -> StreamingResponse:
    """Return the sampled raw rows of one or more versions as JSONL.

    ``name``: the endpoint, the Deployment or the model whose versions are meant. The rows of each version
    come oldest first. Only Deployments with ``keep_rows`` have raw rows.
    """
    operator = caller.require(OPERATE)
    found = request.app.state.drift.rows(name)
    log.info("raw rows read", extra={"name_": name, "by": operator.id})
    return StreamingResponse(found, media_type="application/jsonl")


@router.post("/{name}/rebase")
async def rebase(request: Request, name: str) -> dict[str, Any]:
    """Replace the baselines of versions by new ones that are made from the next sampled rows.

    ``name``: the endpoint, the Deployment or the model whose versions are meant. A version with a training
    baseline keeps that baseline.
    """
    found: dict[str, Any] = await request.app.state.drift.rebase(name)
    return found


@quality_router.get("")
async def all_quality(request: Request) -> dict[str, Any]:
    """Return the quality of every deployed version: its last window with labels, and the last estimate."""
    found: dict[str, Any] = request.app.state.quality.snapshot()
    return found


@quality_router.get("/{name}")
async def quality(request: Request, name: str) -> dict[str, Any]:
    """Return the quality of the versions behind an endpoint, a Deployment or a model, with all windows."""
    found: dict[str, Any] = request.app.state.quality.shown(name)
    return found
