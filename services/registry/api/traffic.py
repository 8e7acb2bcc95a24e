"""Moving an endpoint's traffic: back to an earlier version, or shared among several."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

from services.registry.adapters.sql import audit
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.bodies import registrar
from services.registry.application.registrar import Registrar
from services.registry.domain import rollback, traffic_split
from tidegate.kernel.protocol.models import Deployment, Endpoint, Noun, Target
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/endpoints", tags=["endpoints"], route_class=JsonRoute)

Core = Annotated[Registrar, Depends(registrar)]


class RollbackBody(Noun):
    """The version to go back to."""

    version: int | None = Field(
        None, ge=1, le=2**31 - 1, description="None: the last one that served before what serves now."
    )


class RolledBack(BaseModel):
    """The Deployments that serve once they are ready, and those that they replace."""

    deployment: Deployment
    endpoint: Endpoint
    replaced: list[str] = Field(description="Deployments that serve until then; empty: nothing changes.")
    remade: bool = Field(description="The Deployment had been deleted, and was made again.")


class SplitBody(Noun):
    """The Deployments that share the traffic, by weight."""

    targets: list[Target] = Field(min_length=1, max_length=1_000)


@router.post("/{name}/rollback")
async def roll_back(core: Core, name: str, body: RollbackBody | None = None) -> RolledBack:
    """Let an Endpoint go back to an earlier version; what serves now goes on until that one is ready.

    409 if there is no earlier version. A roll-out that is under way is given up.
    """
    version = body.version if body else None
    async with core.change() as writer:
        snapshot = await writer.snapshot()
        history = await audit.history_of(writer.connection, name, snapshot.deployments)
        plan = rollback.rollback(snapshot, name, version, history)
        await writer.apply(plan.changes)
        deployment = (await writer.deployments(plan.deployment))[0]
        endpoint = (await writer.endpoints(name))[0]
    return RolledBack(deployment=deployment, endpoint=endpoint, replaced=plan.replaced, remade=plan.remade)


@router.post("/{name}/split")
async def share(core: Core, name: str, body: SplitBody, response: Response) -> Endpoint:
    """Share an Endpoint's traffic among Deployments; what serves now goes on until each of them is ready."""

    async def answer(reader: DesiredStateReader) -> Endpoint:
        return (await reader.endpoints(name))[0]

    found = await core.decide(lambda now: traffic_split.split(now, name, body.targets), answer)
    response.headers["ETag"] = f'"{found.revision}"'
    return found
