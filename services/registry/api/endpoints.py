"""Routes that create, read and delete Endpoints, and that complete a roll-over when the targets are ready."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.bodies import EndpointFields, Page, SettleBody
from services.registry.api.dependencies import TransactionsDep, guarded, with_etag
from services.registry.api.searches import NamedPageDep
from services.registry.domain import edits, names, rollover, stated_rollouts
from services.registry.domain.desired_state import Change, RegistrySnapshot
from services.registry.domain.stated_rollouts import RolloutStart
from tidegate.kernel.protocol.models import Endpoint
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/endpoints", tags=["endpoints"], route_class=JsonRoute)
GUARDED = guarded("endpoint")


@router.put("/{name}", dependencies=[GUARDED], responses={201: {"model": Endpoint}})
async def put(transactions: TransactionsDep, name: str, body: EndpointFields, response: Response) -> Endpoint:
    """Create or replace an Endpoint. Return 201 if it is new.

    If the body has no ``previous``, the current Deployments serve until the new targets are ready. A
    ``rollout`` that has only ``deployment`` and ``options`` starts a canary.
    """
    created = False
    start = RolloutStart(secrets.token_hex(4), transactions.now().timestamp())

    def decision(now: RegistrySnapshot) -> list[Change]:
        nonlocal created
        created = name not in now.endpoints
        return stated_rollouts.put_endpoint(now, name, body, start=start)

    endpoint = await transactions.decide(decision, lambda reader: _read(reader, name))
    response.status_code = 201 if created else 200
    return with_etag(endpoint, response)


@router.get("")
async def list_all(transactions: TransactionsDep, page: NamedPageDep) -> Page[Endpoint]:
    """Return all Endpoints, sorted by name, or one page of them."""
    async with transactions.read() as reader:
        items, following = page.split(await reader.endpoints(page=page))
        return Page(items=items, next=following)


@router.get(
    "/{name}", response_model=Endpoint, responses={304: {"description": "The Endpoint has not changed."}}
)
async def get(
    transactions: TransactionsDep,
    name: str,
    response: Response,
    known: Annotated[str | None, Header(alias="If-None-Match")] = None,
) -> Any:
    """Return one Endpoint. The ``ETag`` is its revision.

    If ``If-None-Match`` contains this ``ETag``, return 304.
    """
    async with transactions.read() as reader:
        found = with_etag(await _read(reader, name), response)
    if known is not None and response.headers["ETag"] in known:
        return Response(status_code=304, headers={"ETag": response.headers["ETag"]})
    return found


@router.delete("/{name}", dependencies=[GUARDED], status_code=204)
async def delete(transactions: TransactionsDep, name: str) -> None:
    """Delete an Endpoint; its Deployments stay."""
    await transactions.decide(lambda now: edits.delete_endpoint(now, name), DesiredStateReader.revision)


@router.post("/{name}/settle", dependencies=[GUARDED])
async def settle(
    transactions: TransactionsDep, name: str, response: Response, body: SettleBody | None = None
) -> Endpoint:
    """End a roll-over whose targets are ready.

    Then each replaced Deployment scales to zero, unless something else uses it. A Deployment that a user
    created or replaced by PUT or apply does not scale to zero.

    If no roll-over is in progress, do nothing. Otherwise, return 409 if the Endpoint is no longer at the
    ``revision`` in the body.
    """
    seen = body.revision if body else None
    endpoint = await transactions.decide(
        lambda now: rollover.settle(now, name, seen), lambda reader: _read(reader, name)
    )
    return with_etag(endpoint, response)


async def _read(reader: DesiredStateReader, name: str) -> Endpoint:
    endpoints = await reader.endpoints(name)
    if not endpoints:
        raise names.unknown("Endpoint", name)
    return endpoints[0]
