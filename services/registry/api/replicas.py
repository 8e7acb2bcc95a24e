"""The route for the running replicas, and the check that a replica reads only its own artifact."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from services.registry.application.running_replicas import RunningReplicas
from tidegate.kernel.errors import Forbidden
from tidegate.kernel.protocol import access, replica_token
from tidegate.kernel.protocol.access import SERVICE, Principal
from tidegate.kernel.protocol.models import Digest, Noun
from tidegate.kernel.service import caller
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.caller import ServiceToken
from tidegate.kernel.service.guard import Identify

router = APIRouter(prefix="/v1/replicas", tags=["replicas"], route_class=JsonRoute)
MAX_REPLICAS = 100_000
MAX_NAME_LENGTH = 255


class ReplicaReport(Noun):
    """The running replicas, each with the sha256 of the artifact that it may read."""

    artifacts: dict[Annotated[str, Field(max_length=MAX_NAME_LENGTH)], Digest] = Field(
        max_length=MAX_REPLICAS
    )


def identify(service_token: str) -> Identify:
    """Return a function that identifies callers: services by the service token, replicas by their tokens."""
    services = ServiceToken(service_token)

    def principal(headers: dict[bytes, bytes]) -> Principal:
        replica = replica_token.holder(service_token, headers.get(b"authorization", b""))
        return services.identify(headers) if replica is None else access.replica_principal(replica)

    return principal


def replicas(request: Request) -> RunningReplicas:
    """Return the application's object for the running replicas."""
    running: RunningReplicas = request.app.state.replicas
    return running


async def refuse_replicas() -> None:
    """Raise Forbidden if the caller is a replica. Every route has this check, except those for replicas."""
    if _replica() is not None:
        raise Forbidden(
            "A replica's token gives access only to that replica's artifact. Use a service token or an API "
            "key."
        )


def is_replica() -> bool:
    """Return True if the caller is a replica."""
    return _replica() is not None


async def own_artifact(sha256: str, running: Annotated[RunningReplicas, Depends(replicas)]) -> None:
    """Raise Forbidden if the caller is a replica that does not run or has another artifact."""
    replica = _replica()
    if replica is not None and not await running.may_read(replica, sha256):
        raise Forbidden("A replica may read only its own artifact, and only while the replica runs.")


@router.put("", status_code=204)
async def put(body: ReplicaReport, running: Annotated[RunningReplicas, Depends(replicas)]) -> None:
    """Replace the set of running replicas. Only for the autoscaler."""
    if caller.current.get().principal is not SERVICE:
        raise Forbidden("Only the autoscaler may report which replicas run.")
    await running.report(body.artifacts)


def _replica() -> str | None:
    id_ = caller.current.get().principal.id
    return id_.removeprefix(access.REPLICA_PREFIX) if id_.startswith(access.REPLICA_PREFIX) else None
