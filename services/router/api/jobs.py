"""HTTP routes for the ledger of jobs and for the secrets that sign webhooks."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Query, Request

from services.router.domain.webhooks import secret_of
from tidegate.kernel.protocol.access import ADMIN, INFER, OPERATE
from tidegate.kernel.service import caller

router = APIRouter(prefix="/v1", tags=["jobs"])


@router.get("/ledger")
async def ledger(request: Request) -> dict[str, Any]:
    """Return the latest report of the ledger of jobs.

    Its field ``unaccounted`` is the number of lost jobs; null if the number is unknown.
    """
    caller.require(OPERATE)
    report: dict[str, Any] = request.app.state.ledger.report.to_json()
    return report


@router.get("/webhooks/secret")
async def webhook_secret(
    request: Request, principal: str | None = Query(None, min_length=1, max_length=200)
) -> dict[str, str]:
    """Return the secret that signs the webhooks of a caller.

    ``principal``: the id of this caller; None means the caller that sends the request. To get the secret of
    another caller, the sender needs the scope ``admin``.
    """
    own = caller.require(INFER).id
    if principal is not None and principal != own:
        caller.require(ADMIN)
    id_ = principal or own
    return {"principal": id_, "secret": secret_of(request.app.state.webhook_master, id_)}
