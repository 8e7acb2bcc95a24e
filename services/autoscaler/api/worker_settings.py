"""The route for the settings of a new worker."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from services.autoscaler.adapters.worker_settings import read_worker_settings

router = APIRouter(prefix="/v1", tags=["settings"])


@router.get("/settings/workers")
async def list_worker_settings(request: Request) -> dict[str, Any]:
    """Return every setting of a worker that starts now, in the format of `/v1/settings` of the services."""
    return await read_worker_settings(request.app.state.worker_environment)
