"""Routes of the stages of versions and of approvals."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import Field

from services.registry.api.dependencies import StagesDep
from services.registry.api.models import Number
from services.registry.application.stages import StageView
from services.registry.domain.model_policy import StageName
from tidegate.kernel.protocol.models import Noun
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/models/{name}/versions/{number}", tags=["models"], route_class=JsonRoute)


class StageBody(Noun):
    """The stage that a version enters. ``none``: no stage."""

    stage: StageName


class ApprovalBody(StageBody):
    """The stage for which a version is approved."""

    comment: str = Field("", max_length=1_000)


@router.get("/stage")
async def get_stage(stages: StagesDep, name: str, number: Number) -> StageView:
    """Return a version's stage and approvals, and the unmet requirements of the next stage."""
    return await stages.view(name, number)


@router.put("/stage")
async def set_stage(stages: StagesDep, name: str, number: Number, body: StageBody) -> StageView:
    """Move a version to a stage.

    Return 409 ``stage_required`` if the version does not meet all requirements of the stage. The error lists
    the unmet requirements. A version can always go back to an earlier stage, or to ``none``.
    """
    return await stages.move(name, number, body.stage)


@router.post("/approvals")
async def approve(stages: StagesDep, name: str, number: Number, body: ApprovalBody) -> StageView:
    """Approve a version for a stage. The stage's rules name the scope that the caller needs."""
    return await stages.approve(name, number, body.stage, body.comment)


@router.delete("/approvals/{stage}", status_code=204)
async def withdraw_approval(stages: StagesDep, name: str, number: Number, stage: str) -> None:
    """Withdraw the caller's own approval."""
    await stages.withdraw(name, number, stage)
