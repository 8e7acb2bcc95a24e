"""HTTP doors of the autoscaler: statuses, overrides, replicas, decisions, cold starts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from services.autoscaler.operations import Operations
from tidegate.protocol.models import DeploymentStatus

router = APIRouter(prefix="/v1", tags=["autoscaler"])


class ReplicasWish(BaseModel):
    """An operator's word: so many replicas, for ``ttl_s`` seconds (null: until it is lifted)."""

    model_config = ConfigDict(extra="forbid")

    replicas: int = Field(ge=0, le=10_000)
    ttl_s: float | None = Field(None, gt=0)


class WishKept(BaseModel):
    """Who holds the word: the registry, or the autoscaler until the registry is back."""

    deployment: str
    replicas: int | None
    held_by: str


def _operations(request: Request) -> Operations:
    found: Operations = request.app.state.operations
    return found


Core = Annotated[Operations, Depends(_operations)]


@router.get("/deployments")
async def list_deployments(core: Core) -> dict[str, list[DeploymentStatus]]:
    """The status of every Deployment."""
    return {"items": await core.statuses()}


@router.get("/deployments/{name}")
async def get_deployment(name: str, core: Core) -> DeploymentStatus:
    """The status of one Deployment, with conditions, replicas and the last cold starts."""
    return await core.status(name)


@router.put("/deployments/{name}/replicas")
async def override_replicas(name: str, wish: ReplicasWish, core: Core) -> WishKept:
    """Fix the number of replicas; wins over demand and over minimum and maximum."""
    held_by = await core.override(name, wish.replicas, wish.ttl_s)
    return WishKept(deployment=name, replicas=wish.replicas, held_by=held_by)


@router.delete("/deployments/{name}/replicas")
async def lift_override(name: str, core: Core) -> WishKept:
    """Give the number of replicas back to the policy."""
    return WishKept(deployment=name, replicas=None, held_by=await core.lift(name))


@router.get("/deployments/{name}/cold-starts")
async def list_cold_starts(name: str, core: Core) -> dict[str, list[dict[str, Any]]]:
    """The last starts of replicas, newest first, with their parts in milliseconds."""
    return {"items": (await core.status(name)).cold_starts}


@router.get("/replicas")
async def list_replicas(core: Core) -> dict[str, list[dict[str, Any]]]:
    """Every replica that exists, those of deleted Deployments included."""
    return {"items": core.replicas()}


@router.post("/replicas/{replica}/drain", status_code=202)
async def drain_replica(replica: str, core: Core) -> dict[str, str]:
    """Let one replica finish what it holds and exit; another takes its place."""
    await core.drain(replica)
    return {"replica": replica, "state": "draining"}


@router.get("/decisions")
async def list_decisions(
    core: Core,
    deployment: str | None = None,
    limit: Annotated[int, Query(ge=1, le=5000)] = 100,
) -> dict[str, list[dict[str, Any]]]:
    """What was decided, from which inputs, by which rule and why; newest first."""
    return {"items": await core.decisions(deployment, limit)}


@router.get("/policy")
async def show_policy(core: Core) -> dict[str, Any]:
    """The windows and limits that decisions follow (seconds)."""
    return asdict(core.policy)
