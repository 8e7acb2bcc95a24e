"""Routes for operators: statuses, policies, overrides, hosts, replicas, decisions, cold starts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from services.autoscaler.application.operations import Operations
from tidegate.kernel.protocol.deployment_status import DeploymentStatus
from tidegate.kernel.protocol.scaling import Scaling
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.openapi import inlined

router = APIRouter(prefix="/v1", tags=["autoscaler"], route_class=JsonRoute)

SCALING = inlined(Scaling)


class OverrideRequest(BaseModel):
    """A fixed number of replicas for ``ttl_s`` seconds (null: until an operator removes the override).

    ``force`` allows more than the Deployment's maximum, but never more than the host has room for.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    replicas: int = Field(ge=0, le=10_000)
    ttl_s: float | None = Field(None, gt=0)
    force: bool = False


class PauseRequest(BaseModel):
    """A pause of a Deployment's scaling for ``ttl_s`` seconds (null: until an operator ends it).

    A pause ends all replicas. With ``hold``, the current number of replicas stays instead.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    hold: bool = False
    ttl_s: float | None = Field(None, gt=0)


class CordonRequest(BaseModel):
    """Options of a cordon. ``drain``: True if the replicas of the host are drained, too."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    drain: bool = False


class PolicyChange(BaseModel):
    """Changes to a Deployment's scaling policy. Omitted fields do not change; null sets the default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    min_replicas: int | None = Field(None, ge=0, le=10_000)
    max_replicas: int | None = Field(None, ge=1, le=10_000)
    scale_to_zero_after_s: float | None = Field(None, ge=0)
    target_wait_ms: float | None = Field(None, gt=0)
    scaling: dict[str, Any] | None = Field(
        None, description="Fields of Scaling.", json_schema_extra={"properties": SCALING["properties"]}
    )


class OverrideResult(BaseModel):
    """An override and its effect.

    - ``replicas``: the requested number of replicas; null if the override was removed
    - ``held_by``: where the override is stored: ``registry``, or ``autoscaler`` until the registry answers
    - ``runs``: the resulting number of replicas; null if it is not known yet
    - ``bounded_by``: the limit that applied: ``maximum``, ``schedule``, ``cost cap``, ``budget`` or ``host``
    - ``reason``: why ``runs`` is smaller than ``replicas``; empty if it is not smaller
    """

    deployment: str
    replicas: int | None
    held_by: str
    runs: int | None = None
    bounded_by: str | None = None
    reason: str = ""


def _operations(request: Request) -> Operations:
    found: Operations = request.app.state.operations
    return found


OperationsDep = Annotated[Operations, Depends(_operations)]


@router.get("/deployments")
async def list_deployments(operations: OperationsDep) -> dict[str, list[DeploymentStatus]]:
    """Return the status of every Deployment."""
    return {"items": await operations.statuses()}


@router.get("/deployments/{name}")
async def get_deployment(name: str, operations: OperationsDep) -> DeploymentStatus:
    """Return the status of one Deployment, with conditions, replicas and the last cold starts."""
    return await operations.status(name)


@router.put("/deployments/{name}/replicas")
async def override_replicas(name: str, body: OverrideRequest, operations: OperationsDep) -> OverrideResult:
    """Set a fixed number of replicas.

    The limits are the host's resources and, unless forced, the Deployment's maximum.
    """
    held_by, effect = await operations.override(name, body.replicas, body.ttl_s, force=body.force)
    return OverrideResult(
        deployment=name,
        replicas=body.replicas,
        held_by=held_by,
        runs=effect.replicas,
        bounded_by=effect.bounded_by,
        reason=effect.reason,
    )


@router.delete("/deployments/{name}/replicas")
async def remove_override(name: str, operations: OperationsDep) -> OverrideResult:
    """Remove the override, so that the policy sets the number of replicas again."""
    return OverrideResult(deployment=name, replicas=None, held_by=await operations.remove_override(name))


@router.post("/deployments/{name}/pause")
async def pause(name: str, body: PauseRequest, operations: OperationsDep) -> OverrideResult:
    """Pause scaling: end all replicas. With ``hold``, keep their current number instead.

    Demand does not change the number of replicas during the pause.
    """
    replicas, held_by = await operations.pause(name, body.ttl_s, hold=body.hold)
    return OverrideResult(deployment=name, replicas=replicas, held_by=held_by)


@router.post("/deployments/{name}/resume")
async def resume(name: str, operations: OperationsDep) -> OverrideResult:
    """Remove the pause, so that the policy sets the number of replicas again."""
    return OverrideResult(deployment=name, replicas=None, held_by=await operations.remove_override(name))


@router.get("/deployments/{name}/why")
async def why(name: str, operations: OperationsDep) -> dict[str, Any]:
    """Explain the number of replicas: load, the number that each rule wants, bounds, delays and decisions."""
    return await operations.why(name)


@router.get("/deployments/{name}/policy")
async def show_deployment_policy(name: str, operations: OperationsDep) -> dict[str, Any]:
    """Return how a Deployment scales: its options, the resulting values, and the current bounds."""
    return operations.policy_of(name)


@router.patch("/deployments/{name}/policy")
async def change_policy(name: str, change: PolicyChange, operations: OperationsDep) -> dict[str, Any]:
    """Change how a Deployment scales. The registry stores the change, so the registry must answer."""
    return await operations.change_policy(name, change.model_dump(exclude_unset=True))


@router.get("/deployments/{name}/cold-starts")
async def list_cold_starts(name: str, operations: OperationsDep) -> dict[str, list[dict[str, Any]]]:
    """Return the last cold starts, newest first, with their phases in milliseconds."""
    return {"items": (await operations.status(name)).cold_starts}


@router.get("/cold-starts")
async def report_cold_starts(operations: OperationsDep) -> dict[str, list[dict[str, Any]]]:
    """Return the cold start times of each Deployment, in ms: median, longest, and median of each phase."""
    return {"items": await operations.cold_starts()}


@router.get("/hosts")
async def list_hosts(operations: OperationsDep) -> dict[str, list[dict[str, Any]]]:
    """Return the hosts, each with its number of replicas and the time of its cordon, if it has one.

    ``cores``, ``memory_mb`` and ``available_mb`` are the resources of the host, if they are known.
    """
    return {"items": operations.hosts()}


@router.put("/hosts/{host}/cordon")
async def cordon(host: str, body: CordonRequest, operations: OperationsDep) -> dict[str, Any]:
    """Start no more replicas on a host."""
    return {"host": host, "cordoned": True, "drained": await operations.cordon(host, drain=body.drain)}


@router.delete("/hosts/{host}/cordon")
async def uncordon(host: str, operations: OperationsDep) -> dict[str, Any]:
    """Allow starts on a host again."""
    await operations.uncordon(host)
    return {"host": host, "cordoned": False}


@router.get("/replicas")
async def list_replicas(operations: OperationsDep) -> dict[str, list[dict[str, Any]]]:
    """Return every replica that exists, including those of deleted Deployments."""
    return {"items": operations.replicas()}


@router.post("/replicas/{replica}/drain", status_code=202)
async def drain_replica(replica: str, operations: OperationsDep) -> dict[str, str]:
    """Drain one replica: it finishes its requests and exits, and a new one replaces it."""
    await operations.drain(replica)
    return {"replica": replica, "state": "draining"}


@router.get("/warm")
async def list_warm(operations: OperationsDep) -> dict[str, list[dict[str, Any]]]:
    """Return the warm pools, each with its size, its waiting workers, and its last problem."""
    return {"items": operations.warm()}


@router.get("/decisions")
async def list_decisions(
    operations: OperationsDep,
    deployment: str | None = None,
    limit: Annotated[int, Query(ge=1, le=5000)] = 100,
) -> dict[str, list[dict[str, Any]]]:
    """Return decisions with their inputs, rules and reasons, newest first."""
    return {"items": await operations.decisions(deployment, limit)}


@router.get("/policy")
async def show_policy(operations: OperationsDep) -> dict[str, Any]:
    """Return the times and limits that all decisions use. Names that end in ``_s`` are in seconds."""
    return asdict(operations.policy)
