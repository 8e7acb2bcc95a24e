"""Routes about costs: the report and the prices."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from services.autoscaler.application.cost_ledger import CostLedger
from services.autoscaler.domain.costs.lives import HOUR_S
from services.autoscaler.domain.costs.report import By
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1", tags=["autoscaler"], route_class=JsonRoute)

DAY_S = 86_400.0


def _ledger(request: Request) -> CostLedger:
    found: CostLedger = request.app.state.costs
    return found


LedgerDep = Annotated[CostLedger, Depends(_ledger)]


@router.get("/costs")
async def report_costs(
    ledger: LedgerDep,
    since: Annotated[
        float | None, Query(description="Seconds since the epoch. Default: a day before `until`.")
    ] = None,
    until: Annotated[float | None, Query(description="Seconds since the epoch. Default: now.")] = None,
    by: By = "deployment",
    deployment: str | None = None,
) -> dict[str, Any]:
    """Return the costs of replicas in a period of whole hours.

    The costs are grouped by Deployment, version, endpoint or key.
    """
    now = time.time()
    end = now if until is None else until
    begin = (end - DAY_S if since is None else since) // HOUR_S * HOUR_S
    if not begin <= end:
        raise BadRequest("`since` is later than `until`. Swap the two times.")
    return await ledger.report(begin, end, by, deployment)


@router.get("/prices")
async def list_prices(ledger: LedgerDep) -> dict[str, Any]:
    """Return the price list, and for each Deployment the price of a replica per hour."""
    return ledger.rates()
