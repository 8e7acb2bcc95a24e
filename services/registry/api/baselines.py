"""Routes of the training baselines of versions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from services.registry.api.dependencies import BaselinesDep, guarded, set_etag
from services.registry.api.models import Number
from services.registry.domain.preconditions import content_etag
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(
    prefix="/v1/models/{name}/versions/{number}/baseline", tags=["models"], route_class=JsonRoute
)
GUARDED = guarded("baseline")


@router.get("")
async def get_baseline(
    baselines: BaselinesDep, name: str, number: Number, response: Response
) -> dict[str, Any]:
    """Return a version's training baseline: the profile of its training data."""
    found = await baselines.get(name, number)
    set_etag(response, content_etag(found))
    return found


@router.put("", dependencies=[GUARDED])
async def put_baseline(
    baselines: BaselinesDep, name: str, number: Number, body: dict[str, Any]
) -> dict[str, str]:
    """Set or replace a version's training baseline. Return its sha256."""
    return {"sha256": await baselines.put(name, number, body)}


@router.delete("", dependencies=[GUARDED], status_code=204)
async def delete_baseline(baselines: BaselinesDep, name: str, number: Number) -> None:
    """Delete a version's training baseline.

    The next full window of the version's samples becomes the new baseline.
    """
    await baselines.delete(name, number)
