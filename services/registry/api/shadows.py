"""Routes to start and stop shadow traffic. The route ``promote`` is in ``rollouts.py``."""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import AwareDatetime, Field

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.dependencies import TransactionsDep, guarded, with_etag
from services.registry.domain import shadows
from services.registry.domain.desired_state import Change, RegistrySnapshot
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import (
    LARGEST,
    Endpoint,
    Name,
    Shadow,
    Tolerance,
    Written,
    unfit_for_shadow,
)
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/endpoints", tags=["shadows"], route_class=JsonRoute)
GUARDED = guarded("endpoint")


class ShadowBody(Written):
    """The version or Deployment that gets copies of the endpoint's requests."""

    version: int | None = Field(
        None,
        ge=1,
        le=LARGEST,
        description="A version of the model. If it has no Deployment, one is created.",
    )
    deployment: Name | None = Field(None, description="An existing Deployment, instead of a version.")
    rate: float = Field(100.0, gt=0, le=100, description="Percent of the requests that are copied.")
    max_per_s: float | None = Field(
        None, gt=0, le=LARGEST, description="Maximum number of copies per second from each gateway process."
    )
    tolerance: Tolerance = Tolerance(atol=1e-6, rtol=1e-4)
    wake: bool = Field(
        False, description="True: copies can start a replica. False: copies use only idle replicas."
    )
    until: AwareDatetime | None = Field(None, description="Time at which the copying ends; None: never.")


@router.put("/{name}/shadow", dependencies=[GUARDED])
async def start(transactions: TransactionsDep, name: str, body: ShadowBody, response: Response) -> Endpoint:
    """Send copies of an endpoint's answered requests to another Deployment, and compare the answers.

    This replaces an earlier shadow of the endpoint. Callers never see the shadow's answers.
    """
    if (body.version is None) == (body.deployment is None):
        raise BadRequest("Name the shadow by version or by deployment, not by both.")
    id_ = secrets.token_hex(4)

    def decision(snapshot: RegistrySnapshot) -> list[Change]:
        changes: list[Change] = []
        deployment = body.deployment
        if body.version is not None:
            changes, deployment = shadows.version_changes(snapshot, name, body.version, wake=body.wake)
        options = body.model_dump(exclude={"version", "deployment"})
        shadow = Shadow.model_validate({**options, "deployment": deployment, "id": id_})
        return changes + shadows.start(snapshot.after(changes), name, shadow)

    return with_etag(await transactions.decide(decision, lambda reader: _checked(reader, name)), response)


@router.delete("/{name}/shadow", dependencies=[GUARDED])
async def stop(
    transactions: TransactionsDep,
    name: str,
    response: Response,
    id: Annotated[str | None, Query(description="End only the shadow with this id.")] = None,
) -> Endpoint:
    """End an endpoint's shadow traffic.

    If nothing else uses the shadow's Deployment, the Deployment scales to zero. A Deployment that a user
    created or replaced by PUT or apply does not scale to zero.
    """
    endpoints = await transactions.decide(
        lambda snapshot: shadows.stop(snapshot, name, id), lambda reader: reader.endpoints(name)
    )
    return with_etag(endpoints[0], response)


async def _checked(reader: DesiredStateReader, name: str) -> Endpoint:
    """Return the endpoint. Raise BadRequest if the shadow's answers cannot be compared.

    The error rolls back the transaction, so the shadow is not started.
    """
    (endpoint,) = await reader.endpoints(name)
    assert endpoint.shadow is not None
    (deployment,) = await reader.deployments(endpoint.shadow.deployment)
    (version,) = await reader.versions(deployment.model, deployment.version)
    if (problem := unfit_for_shadow(version)) is not None:
        raise BadRequest(
            f"{deployment.name} {problem}. To compare this version, start a canary instead: leave out "
            "--shadow."
        )
    return endpoint
