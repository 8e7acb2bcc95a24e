"""Routes that move an Endpoint's traffic: roll back to an earlier version, or split the traffic."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from services.registry.adapters.sql import audit
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.dependencies import TransactionsDep, guarded, with_etag
from services.registry.domain import rollback, stages, traffic_split, verification
from tidegate.kernel.protocol.models import Deployment, Endpoint, Noun, Target
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/endpoints", tags=["endpoints"], route_class=JsonRoute)
GUARDED = guarded("endpoint")


class RollbackBody(Noun):
    """The version to go back to."""

    version: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description="Number of the version; None: the version that served before the current one.",
    )


class RolledBack(BaseModel):
    """The Deployment that gets the traffic, and the Deployments that it replaces."""

    deployment: Deployment
    endpoint: Endpoint
    replaced: list[str] = Field(
        description=("Deployments that the rollback replaces; empty: nothing changes.")
    )
    remade: bool = Field(description="True if the Deployment had been deleted and was created again.")


class SplitBody(Noun):
    """The Deployments that share the traffic, by weight."""

    targets: list[Target] = Field(min_length=1, max_length=1_000)


@router.post("/{name}/rollback", dependencies=[GUARDED])
async def roll_back(transactions: TransactionsDep, name: str, body: RollbackBody | None = None) -> RolledBack:
    """Roll an Endpoint back to an earlier version.

    The current version serves until the earlier one is ready. A rollback also ends a roll-over to a newer
    version, a canary or an experiment that is in progress. Return 409 if no earlier version exists.
    """
    version = body.version if body else None
    async with transactions.change() as writer:
        snapshot = await writer.snapshot()
        history = await audit.history_of(writer.connection, name, snapshot.deployments)
        plan = rollback.rollback(snapshot, name, version, history, transactions.now().timestamp())
        verification.check(snapshot, plan.changes)
        stages.check(snapshot, plan.changes)
        await writer.apply(plan.changes)
        deployment = (await writer.deployments(plan.deployment))[0]
        endpoint = (await writer.endpoints(name))[0]
    return RolledBack(deployment=deployment, endpoint=endpoint, replaced=plan.replaced, remade=plan.remade)


@router.post("/{name}/split", dependencies=[GUARDED])
async def split(transactions: TransactionsDep, name: str, body: SplitBody, response: Response) -> Endpoint:
    """Split an Endpoint's traffic among Deployments, in proportion to their weights.

    The current Deployments serve until all new Deployments are ready.
    """

    async def result(reader: DesiredStateReader) -> Endpoint:
        return (await reader.endpoints(name))[0]

    endpoint = await transactions.decide(lambda now: traffic_split.split(now, name, body.targets), result)
    return with_etag(endpoint, response)
