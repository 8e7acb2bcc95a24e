"""Replicas at the registry: which ones run, and that each reads its own artifact only."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from tidegate.kernel.errors import Forbidden
from tidegate.kernel.protocol import access, replica_token
from tidegate.kernel.protocol.access import SERVICE, Principal
from tidegate.kernel.protocol.models import Digest, Noun
from tidegate.kernel.protocol.replica_token import Replicas
from tidegate.kernel.service import caller
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.app import Identify
from tidegate.kernel.service.caller import ServiceToken

router = APIRouter(prefix="/v1/replicas", tags=["replicas"], route_class=JsonRoute)
MOST = 100_000
LONGEST_NAME = 255


class RunningReplicas(Noun):
    """The replicas that run, each with the sha256 of the artifact that it may read."""

    artifacts: dict[Annotated[str, Field(max_length=LONGEST_NAME)], Digest] = Field(max_length=MOST)


def identify(service_token: str) -> Identify:
    """Return what tells callers from their headers: services by the service token, replicas by their own."""
    services = ServiceToken(service_token)

    def principal(headers: dict[bytes, bytes]) -> Principal:
        replica = replica_token.holder(service_token, headers.get(b"authorization", b""))
        return services.identify(headers) if replica is None else access.replica_principal(replica)

    return principal


def replicas(request: Request) -> Replicas:
    """Return which replicas run, as the autoscaler said last."""
    found: Replicas = request.app.state.replicas
    return found


async def refuse_replicas() -> None:
    """Raise Forbidden for a replica: a dependency of every route but the one that it needs."""
    if _replica() is not None:
        raise Forbidden("A replica's token opens only that replica's own artifact.")


async def own_artifact(sha256: str, running: Annotated[Replicas, Depends(replicas)]) -> None:
    """Raise Forbidden for a replica that does not run, or that asks for another one's artifact."""
    replica = _replica()
    if replica is not None and not running.may_read(replica, sha256):
        raise Forbidden("This token opens only the artifact of a running replica.")


@router.put("", status_code=204)
async def put(body: RunningReplicas, running: Annotated[Replicas, Depends(replicas)]) -> None:
    """Replace the set of replicas that run. Only for the autoscaler."""
    if caller.current.get().principal is not SERVICE:
        raise Forbidden("Only the autoscaler may report which replicas run.")
    running.artifacts = body.artifacts


def _replica() -> str | None:
    who = caller.current.get().principal
    return who.id.removeprefix(access.REPLICA_PREFIX) if who.id.startswith(access.REPLICA_PREFIX) else None
