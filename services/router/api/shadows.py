"""The route that shows an endpoint's shadow traffic and its comparison."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from tidegate.kernel.errors import NotFound

router = APIRouter(prefix="/v1/shadows", tags=["shadows"])


@router.get("/{name}")
async def shadow(request: Request, name: str) -> dict[str, Any]:
    """Return an endpoint's shadow and its report: copies, agreement by output, latencies, and the verdict."""
    desired = request.app.state.controller.desired
    found = next((each for each in desired.endpoints if each.name == name), None) if desired else None
    if found is None:
        raise NotFound(f"There is no endpoint {name!r}. `tidegate routes` lists the endpoints.")
    shown: dict[str, Any] = request.app.state.shadows.shown(found)
    return shown
