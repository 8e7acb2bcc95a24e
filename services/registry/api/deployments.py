"""Routes of Deployments, and of overrides: numbers of replicas that operators set."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Response

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.bodies import DeploymentFields, DeploymentPatch, OverrideBody, Page, PolicyPatch
from services.registry.api.dependencies import TransactionsDep, guarded, with_etag
from services.registry.api.searches import NamedPageDep
from services.registry.application.transactions import Transactions
from services.registry.domain import edits, names
from services.registry.domain.desired_state import Change, RegistrySnapshot
from tidegate.kernel.protocol.models import Deployment, Override
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/deployments", tags=["deployments"], route_class=JsonRoute)
GUARDED = guarded("deployment")


@router.put("/{name}", dependencies=[GUARDED], responses={201: {"model": Deployment}})
async def put(
    transactions: TransactionsDep, name: str, body: DeploymentFields, response: Response
) -> Deployment:
    """Create or replace a Deployment. Return 201 if it is new, 409 if it exists with another version."""
    created = False

    def decision(now: RegistrySnapshot) -> list[Change]:
        nonlocal created
        created = name not in now.deployments
        return edits.put_deployment(now, name, body)

    deployment = await transactions.decide(decision, lambda reader: _read(reader, name))
    response.status_code = 201 if created else 200
    return with_etag(deployment, response)


@router.get("")
async def list_all(
    transactions: TransactionsDep,
    page: NamedPageDep,
    model: Annotated[str | None, Query(description="Only Deployments of this model.")] = None,
) -> Page[Deployment]:
    """Return all Deployments, sorted by name, or one page of them."""
    async with transactions.read() as reader:
        items, following = page.split(await reader.deployments(model=model, page=page))
        return Page(items=items, next=following)


@router.get("/{name}")
async def get(transactions: TransactionsDep, name: str, response: Response) -> Deployment:
    """Return one Deployment. The ``ETag`` is its revision."""
    async with transactions.read() as reader:
        return with_etag(await _read(reader, name), response)


@router.patch("/{name}", dependencies=[GUARDED])
async def patch(
    transactions: TransactionsDep, name: str, body: DeploymentPatch, response: Response
) -> Deployment:
    """Change some options by a JSON merge patch. null restores an option's default."""
    deployment = await transactions.decide(
        lambda now: edits.patch_deployment(now, name, body),
        lambda reader: _read(reader, name),
    )
    return with_etag(deployment, response)


@router.patch("/{name}/policy", dependencies=[GUARDED])
async def patch_policy(
    transactions: TransactionsDep, name: str, body: PolicyPatch, response: Response
) -> Deployment:
    """Change how a Deployment scales, by a JSON merge patch."""
    deployment = await transactions.decide(
        lambda now: edits.change_policy(now, name, body), lambda reader: _read(reader, name)
    )
    return with_etag(deployment, response)


@router.delete("/{name}", dependencies=[GUARDED], status_code=204)
async def delete(transactions: TransactionsDep, name: str) -> None:
    """Delete a Deployment. Return 409 while an Endpoint names it."""
    await transactions.decide(lambda now: edits.delete_deployment(now, name), DesiredStateReader.revision)


@router.put("/{name}/override", dependencies=[GUARDED])
async def put_override(
    transactions: TransactionsDep, name: str, body: OverrideBody, response: Response
) -> Deployment:
    """Set an override: the number of replicas that a Deployment has from now on.

    The override ends after ``ttl_s`` seconds, or when it is removed.
    """
    expires_at = None if body.ttl_s is None else transactions.now() + timedelta(seconds=body.ttl_s)
    override = Override(replicas=body.replicas, expires_at=expires_at, force=body.force)
    return await _override(transactions, name, override, response)


@router.delete("/{name}/override", dependencies=[GUARDED])
async def delete_override(transactions: TransactionsDep, name: str, response: Response) -> Deployment:
    """Remove an override. If none is set, do nothing."""
    return await _override(transactions, name, None, response)


async def _override(
    transactions: Transactions, name: str, override: Override | None, response: Response
) -> Deployment:
    deployment = await transactions.decide(
        lambda now: edits.set_override(now, name, override), lambda reader: _read(reader, name)
    )
    return with_etag(deployment, response)


async def _read(reader: DesiredStateReader, name: str) -> Deployment:
    deployments = await reader.deployments(name)
    if not deployments:
        raise names.unknown("Deployment", name)
    return deployments[0]
