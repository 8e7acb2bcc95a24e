"""HTTP door of the autoscaler for the settings that a new worker would get."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from services.autoscaler.adapters.worker_settings import ask

router = APIRouter(prefix="/v1", tags=["settings"])


@router.get("/settings/workers")
async def list_worker_settings(request: Request) -> dict[str, Any]:
    """Return every setting of a worker that is started now, as `/v1/settings` of the services has them."""
    return await ask(request.app.state.worker_environment)
