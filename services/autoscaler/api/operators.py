"""HTTP doors of the autoscaler: statuses, why, policies, overrides, hosts, replicas, decisions, starts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from services.autoscaler.application.operations import Operations
from tidegate.kernel.protocol.models import DeploymentStatus
from tidegate.kernel.protocol.scaling import Scaling
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.openapi import inlined

router = APIRouter(prefix="/v1", tags=["autoscaler"], route_class=JsonRoute)

SCALING = inlined(Scaling)


class OverrideRequest(BaseModel):
    """An operator's word: so many replicas, for ``ttl_s`` seconds (null: until it is lifted).

    ``force`` goes beyond the Deployment's maximum; nothing goes beyond the host.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    replicas: int = Field(ge=0, le=10_000)
    ttl_s: float | None = Field(None, gt=0)
    force: bool = False


class PauseRequest(BaseModel):
    """For how long to stop (null: until it is resumed); ``hold`` keeps the replicas that there are."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    hold: bool = False
    ttl_s: float | None = Field(None, gt=0)


class CordonRequest(BaseModel):
    """``drain``: let the replicas that are there finish and exit as well."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    drain: bool = False


class PolicyChange(BaseModel):
    """What to change of how a Deployment scales; what is left out stays, null goes back to the default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    min_replicas: int | None = Field(None, ge=0, le=10_000)
    max_replicas: int | None = Field(None, ge=1, le=10_000)
    scale_to_zero_after_s: float | None = Field(None, ge=0)
    target_wait_ms: float | None = Field(None, gt=0)
    scaling: dict[str, Any] | None = Field(
        None, description="Fields of Scaling.", json_schema_extra={"properties": SCALING["properties"]}
    )


class OverrideResult(BaseModel):
    """The store of the override: the registry, or the autoscaler until the registry is back.

    ``replicas`` is what was asked for and ``runs`` what comes of it (null: not known yet). Where that is
    less, ``bounded_by`` and ``reason`` say why: ``maximum``, ``schedule``, ``cost cap`` or ``host``.
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


Core = Annotated[Operations, Depends(_operations)]


@router.get("/deployments")
async def list_deployments(core: Core) -> dict[str, list[DeploymentStatus]]:
    """Return the status of every Deployment."""
    return {"items": await core.statuses()}


@router.get("/deployments/{name}")
async def get_deployment(name: str, core: Core) -> DeploymentStatus:
    """Return the status of one Deployment, with conditions, replicas and the last cold starts."""
    return await core.status(name)


@router.put("/deployments/{name}/replicas")
async def override_replicas(name: str, wish: OverrideRequest, core: Core) -> OverrideResult:
    """Fix the number of replicas, whatever the demand: within the maximum (unless forced) and the host."""
    held_by, found = await core.override(name, wish.replicas, wish.ttl_s, force=wish.force)
    return OverrideResult(
        deployment=name,
        replicas=wish.replicas,
        held_by=held_by,
        runs=found.replicas,
        bounded_by=found.bounded_by,
        reason=found.reason,
    )


@router.delete("/deployments/{name}/replicas")
async def lift_override(name: str, core: Core) -> OverrideResult:
    """Give the number of replicas back to the policy."""
    return OverrideResult(deployment=name, replicas=None, held_by=await core.lift(name))


@router.post("/deployments/{name}/pause")
async def pause(name: str, wish: PauseRequest, core: Core) -> OverrideResult:
    """Stop all replicas, or hold those that run, whatever the demand."""
    replicas, held_by = await core.pause(name, wish.ttl_s, hold=wish.hold)
    return OverrideResult(deployment=name, replicas=replicas, held_by=held_by)


@router.post("/deployments/{name}/resume")
async def resume(name: str, core: Core) -> OverrideResult:
    """Scale by the policy again."""
    return OverrideResult(deployment=name, replicas=None, held_by=await core.lift(name))


@router.get("/deployments/{name}/why")
async def why(name: str, core: Core) -> dict[str, Any]:
    """Explain the number of replicas: signals, each rule's need, bounds, what holds it, last decisions."""
    return await core.why(name)


@router.get("/deployments/{name}/policy")
async def show_deployment_policy(name: str, core: Core) -> dict[str, Any]:
    """Return how a Deployment scales: its options, the values that follow from them, bounds in force."""
    return core.policy_of(name)


@router.patch("/deployments/{name}/policy")
async def change_policy(name: str, change: PolicyChange, core: Core) -> dict[str, Any]:
    """Change how a Deployment scales. The registry keeps it, so it must be there."""
    return await core.change_policy(name, change.model_dump(exclude_unset=True))


@router.get("/deployments/{name}/cold-starts")
async def list_cold_starts(name: str, core: Core) -> dict[str, list[dict[str, Any]]]:
    """Return the last starts of replicas, newest first, with their parts in milliseconds."""
    return {"items": (await core.status(name)).cold_starts}


@router.get("/cold-starts")
async def report_cold_starts(core: Core) -> dict[str, list[dict[str, Any]]]:
    """Return how long starts took, by Deployment: the median, the longest, the median of each part, in ms."""
    return {"items": await core.cold_starts()}


@router.get("/hosts")
async def list_hosts(core: Core) -> dict[str, list[dict[str, Any]]]:
    """Return the hosts: how many replicas each has, and since when it is cordoned.

    ``cores``, ``memory_mb`` and ``available_mb`` are what the host has, as far as that is known.
    """
    return {"items": core.hosts()}


@router.put("/hosts/{host}/cordon")
async def cordon(host: str, wish: CordonRequest, core: Core) -> dict[str, Any]:
    """Start no more replicas on a host."""
    return {"host": host, "cordoned": True, "drained": await core.cordon(host, drain=wish.drain)}


@router.delete("/hosts/{host}/cordon")
async def uncordon(host: str, core: Core) -> dict[str, Any]:
    """Let replicas be started on a host again."""
    await core.uncordon(host)
    return {"host": host, "cordoned": False}


@router.get("/replicas")
async def list_replicas(core: Core) -> dict[str, list[dict[str, Any]]]:
    """Return every replica that exists, those of deleted Deployments included."""
    return {"items": core.replicas()}


@router.post("/replicas/{replica}/drain", status_code=202)
async def drain_replica(replica: str, core: Core) -> dict[str, str]:
    """Drain one replica: it finishes its requests and exits, and another replaces it."""
    await core.drain(replica)
    return {"replica": replica, "state": "draining"}


@router.get("/warm")
async def list_warm(core: Core) -> dict[str, list[dict[str, Any]]]:
    """Return the warm pool by flavour: how many workers are wanted, which are available, what is wrong."""
    return {"items": core.warm()}


@router.get("/decisions")
async def list_decisions(
    core: Core,
    deployment: str | None = None,
    limit: Annotated[int, Query(ge=1, le=5000)] = 100,
) -> dict[str, list[dict[str, Any]]]:
    """Return decisions with their inputs, rules and reasons, newest first."""
    return {"items": await core.decisions(deployment, limit)}


@router.get("/policy")
async def show_policy(core: Core) -> dict[str, Any]:
    """Return the windows and limits that decisions follow (seconds)."""
    return asdict(core.policy)
