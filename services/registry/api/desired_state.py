"""The intention as a whole: read it, apply a file to it, deploy a version in one call."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.bodies import Applied, ApplyBody, DeployBody, Deployed, registrar
from services.registry.application.registrar import Registrar
from services.registry.domain import edits, rollover
from services.registry.domain.desired_state import Change, RegistrySnapshot
from tidegate.kernel.protocol.models import DesiredState
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1", tags=["desired state"], route_class=JsonRoute)

Core = Annotated[Registrar, Depends(registrar)]


@router.get("/intention")
async def read(core: Core) -> DesiredState:
    """Return all Deployments and Endpoints, at one revision."""
    async with core.database.read() as reader:
        return await reader.desired_state()


@router.post("/deploy")
async def deploy(core: Core, body: DeployBody) -> Deployed:
    """Serve a version: make or change its Deployment, and let the Endpoint roll over to it.

    A new version's Deployment has the options of the one it takes over from, unless given.
    """
    plan: rollover.DeployPlan | None = None
    order = rollover.DeployRequest(body.model, body.version, body.deployment, body.endpoint, body.traffic)

    def decision(now: RegistrySnapshot) -> list[Change]:
        nonlocal plan
        plan = rollover.deploy(now, order)
        return plan.changes

    async def answer(reader: DesiredStateReader) -> Deployed:
        assert plan is not None
        deployment = await reader.deployments(plan.deployment)
        endpoint = await reader.endpoints(plan.endpoint)
        return Deployed(deployment=deployment[0], endpoint=next(iter(endpoint), None))

    return await core.decide(decision, answer)


@router.post("/apply")
async def apply(core: Core, body: ApplyBody) -> Applied:
    """State many Deployments and Endpoints at once: all of them or, on any error, none."""
    outcomes: list[edits.ApplyOutcome] = []

    def decision(now: RegistrySnapshot) -> list[Change]:
        changes, outcomes[:] = edits.apply(now, body.deployments, body.endpoints)
        return changes

    async def answer(reader: DesiredStateReader) -> Applied:
        return Applied(revision=await reader.revision(), items=outcomes)

    return await core.decide(decision, answer)
