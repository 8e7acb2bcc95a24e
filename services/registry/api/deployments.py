"""Deployments, and operators' overrides of their number of replicas."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.bodies import (
    DeploymentFields,
    DeploymentPatch,
    Items,
    OverrideBody,
    PolicyPatch,
    if_match,
    registrar,
)
from services.registry.application.registrar import Registrar
from services.registry.domain import edits
from services.registry.domain.desired_state import Change, RegistrySnapshot
from tidegate.kernel.errors import NotFound
from tidegate.kernel.protocol.models import Deployment, Override
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/deployments", tags=["deployments"], route_class=JsonRoute)

Core = Annotated[Registrar, Depends(registrar)]
IfMatch = Annotated[int | None, Depends(if_match)]


@router.put("/{name}", responses={201: {"model": Deployment}})
async def put(
    core: Core, name: str, body: DeploymentFields, expected: IfMatch, response: Response
) -> Deployment:
    """State a Deployment in full. 201 when it is new; 409 when its version would change."""
    made = False

    async def answer(reader: DesiredStateReader) -> Deployment:
        return await _one(reader, name)

    def decision(now: RegistrySnapshot) -> list[Change]:
        nonlocal made
        made = name not in now.deployments
        return edits.put_deployment(now, name, body, expected)

    found = await core.decide(decision, answer)
    response.status_code = 201 if made else 200
    return _tagged(found, response)


@router.get("")
async def list_all(
    core: Core, model: Annotated[str | None, Query(description="Only those of this model.")] = None
) -> Items[Deployment]:
    """Return every Deployment."""
    async with core.database.read() as reader:
        return Items(items=await reader.deployments(model=model))


@router.get("/{name}")
async def get(core: Core, name: str, response: Response) -> Deployment:
    """Return one Deployment; ``ETag`` is its revision."""
    async with core.database.read() as reader:
        return _tagged(await _one(reader, name), response)


@router.patch("/{name}")
async def patch(
    core: Core, name: str, body: DeploymentPatch, expected: IfMatch, response: Response
) -> Deployment:
    """Change some options (JSON merge patch: null puts one back to its default)."""
    found = await core.decide(
        lambda now: edits.patch_deployment(now, name, body, expected),
        lambda reader: _one(reader, name),
    )
    return _tagged(found, response)


@router.patch("/{name}/policy")
async def patch_policy(core: Core, name: str, body: PolicyPatch, response: Response) -> Deployment:
    """Change only how a Deployment scales (JSON merge patch)."""
    found = await core.decide(
        lambda now: edits.change_policy(now, name, body), lambda reader: _one(reader, name)
    )
    return _tagged(found, response)


@router.delete("/{name}", status_code=204)
async def delete(core: Core, name: str) -> None:
    """Delete a Deployment; 409 while an Endpoint names it."""
    await core.decide(lambda now: edits.delete_deployment(now, name), DesiredStateReader.revision)


@router.put("/{name}/override")
async def put_override(core: Core, name: str, body: OverrideBody, response: Response) -> Deployment:
    """Hold the Deployment at this number of replicas, for ``ttl_s`` seconds or until withdrawn."""
    expires_at = None if body.ttl_s is None else core.now() + timedelta(seconds=body.ttl_s)
    override = Override(replicas=body.replicas, expires_at=expires_at, force=body.force)
    return await _override(core, name, override, response)


@router.delete("/{name}/override")
async def delete_override(core: Core, name: str, response: Response) -> Deployment:
    """Withdraw an override; no error when there is none."""
    return await _override(core, name, None, response)


async def _override(core: Registrar, name: str, override: Override | None, response: Response) -> Deployment:
    found = await core.decide(
        lambda now: edits.set_override(now, name, override), lambda reader: _one(reader, name)
    )
    return _tagged(found, response)


async def _one(reader: DesiredStateReader, name: str) -> Deployment:
    found = await reader.deployments(name)
    if not found:
        raise NotFound(f"There is no Deployment {name[:80]!r}.")
    return found[0]


def _tagged(found: Deployment, response: Response) -> Deployment:
    response.headers["ETag"] = f'"{found.revision}"'
    return found
