"""The route that shows an endpoint's canary and its evidence."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from tidegate.kernel.errors import NotFound

router = APIRouter(prefix="/v1/rollouts", tags=["rollouts"])


@router.get("/{name}")
async def rollout(request: Request, name: str) -> dict[str, Any]:
    """Return an endpoint's rollout: evidence by metric, the missing evidence, and points for a chart."""
    desired = request.app.state.controller.desired
    found = next((each for each in desired.endpoints if each.name == name), None) if desired else None
    if found is None:
        raise NotFound(f"There is no endpoint {name!r}. `tidegate routes` lists the endpoints.")
    shown: dict[str, Any] = request.app.state.rollouts.shown(found)
    return shown
