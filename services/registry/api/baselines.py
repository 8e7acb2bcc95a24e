"""Routes of the training baselines of versions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from services.registry.api.dependencies import BaselinesDep
from services.registry.api.models import Number
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(
    prefix="/v1/models/{name}/versions/{number}/baseline", tags=["models"], route_class=JsonRoute
)


@router.get("")
async def get_baseline(baselines: BaselinesDep, name: str, number: Number) -> dict[str, Any]:
    """Return the profile of the training data that a version is compared with."""
    return await baselines.get(name, number)


@router.put("")
async def put_baseline(
    baselines: BaselinesDep, name: str, number: Number, body: dict[str, Any]
) -> dict[str, str]:
    """Set the profile of the training data that a version is compared with. It replaces an earlier one."""
    return {"sha256": await baselines.put(name, number, body)}


@router.delete("", status_code=204)
async def delete_baseline(baselines: BaselinesDep, name: str, number: Number) -> None:
    """Delete a version's training baseline. Its present window becomes the baseline."""
    await baselines.delete(name, number)
