"""HTTP routes of the route table, and the older route of dead letters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Query, Request

from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.access import OPERATE
from tidegate.kernel.service import caller

router = APIRouter(prefix="/v1", tags=["routes"])


@router.get("/routes")
async def routes(request: Request) -> dict[str, Any]:
    """Return the route table. Its fields ``epoch`` and ``n`` are its revision."""
    table: dict[str, Any] | None = request.app.state.controller.table
    if table is None:
        raise Unavailable(
            request.app.state.controller.problem() or "there is no route table yet", retry_after_s=1.0
        )
    return table


@router.get("/exceptions")
async def exceptions(request: Request, limit: int = Query(100, ge=1, le=1000)) -> dict[str, Any]:
    """Return the latest dead letters, newest first. ``/v1/dead`` returns the same and has filters."""
    caller.require(OPERATE)
    letters = request.app.state.dead_letters.all[-limit:]
    return {"items": [letter.public() for letter in reversed(letters)]}
