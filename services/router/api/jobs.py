"""The HTTP door of the router for what it does with jobs: the ledger, and the secrets of webhooks."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Query, Request

from services.router.domain.webhooks import secret_of
from tidegate.kernel.protocol.access import ADMIN, INFER, OPERATE
from tidegate.kernel.service import caller

router = APIRouter(prefix="/v1", tags=["jobs"])


@router.get("/ledger")
async def ledger(request: Request) -> dict[str, Any]:
    """Return the ledger of jobs: ``unaccounted`` is 0 unless one is lost, null while it is unknown."""
    caller.require(OPERATE)
    told: dict[str, Any] = request.app.state.ledger.statement.shown()
    return told


@router.get("/webhooks/secret")
async def webhook_secret(
    request: Request, principal: str | None = Query(None, min_length=1, max_length=200)
) -> dict[str, str]:
    """Return the secret that signs the caller's webhooks; of another ``principal`` with the scope admin."""
    who = caller.require(INFER)
    if principal is not None and principal != who.id:
        caller.require(ADMIN)
    asked = principal or who.id
    return {"principal": asked, "secret": secret_of(request.app.state.webhook_master, asked)}
