"""The intention as a whole: read it, apply a file to it, deploy a version in one call."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from services.registry.adapters.sql.reading import Reader
from services.registry.api.bodies import Applied, ApplyBody, DeployBody, Deployed, registrar
from services.registry.application.registrar import Registrar
from services.registry.domain import rollover, statement
from services.registry.domain.state import Change, Snapshot
from tidegate.kernel.protocol.models import Intention
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1", tags=["intention"], route_class=JsonRoute)

Core = Annotated[Registrar, Depends(registrar)]


@router.get("/intention")
async def read(core: Core) -> Intention:
    """Return all Deployments and Endpoints, at one revision."""
    async with core.database.read() as reader:
        return await reader.intention()


@router.post("/deploy")
async def deploy(core: Core, body: DeployBody) -> Deployed:
    """Serve a version: make or change its Deployment, and let the Endpoint roll over to it.

    A new version's Deployment has the options of the one it takes over from, unless given.
    """
    plan: rollover.Deployed | None = None
    order = rollover.Order(body.model, body.version, body.deployment, body.endpoint, body.traffic)

    def decision(now: Snapshot) -> list[Change]:
        nonlocal plan
        plan = rollover.deploy(now, order)
        return plan.changes

    async def answer(reader: Reader) -> Deployed:
        assert plan is not None
        deployment = await reader.deployments(plan.deployment)
        endpoint = await reader.endpoints(plan.endpoint)
        return Deployed(deployment=deployment[0], endpoint=next(iter(endpoint), None))

    return await core.decide(decision, answer)


@router.post("/apply")
async def apply(core: Core, body: ApplyBody) -> Applied:
    """State many Deployments and Endpoints at once: all of them or, on any error, none."""
    outcomes: list[statement.Outcome] = []

    def decision(now: Snapshot) -> list[Change]:
        changes, outcomes[:] = statement.apply(now, body.deployments, body.endpoints)
        return changes

    async def answer(reader: Reader) -> Applied:
        return Applied(revision=await reader.revision(), items=outcomes)

    return await core.decide(decision, answer)
