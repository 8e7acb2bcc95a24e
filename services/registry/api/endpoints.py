"""Endpoints, and the router's word that a roll-over is done."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.bodies import EndpointFields, Items, SettleBody, if_match, registrar
from services.registry.application.registrar import Registrar
from services.registry.domain import edits, rollover
from services.registry.domain.desired_state import Change, RegistrySnapshot
from tidegate.kernel.errors import NotFound
from tidegate.kernel.protocol.models import Endpoint
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/endpoints", tags=["endpoints"], route_class=JsonRoute)

Core = Annotated[Registrar, Depends(registrar)]
IfMatch = Annotated[int | None, Depends(if_match)]


@router.put("/{name}", responses={201: {"model": Endpoint}})
async def put(core: Core, name: str, body: EndpointFields, expected: IfMatch, response: Response) -> Endpoint:
    """State an Endpoint. 201 when it is new.

    Unless ``previous`` is given, what served until now goes on serving until a target is ready.
    """
    made = False

    def decision(now: RegistrySnapshot) -> list[Change]:
        nonlocal made
        made = name not in now.endpoints
        return edits.put_endpoint(now, name, body, expected)

    found = await core.decide(decision, lambda reader: _one(reader, name))
    response.status_code = 201 if made else 200
    return _tagged(found, response)


@router.get("")
async def list_all(core: Core) -> Items[Endpoint]:
    """Return every Endpoint."""
    async with core.database.read() as reader:
        return Items(items=await reader.endpoints())


@router.get("/{name}")
async def get(core: Core, name: str, response: Response) -> Endpoint:
    """Return one Endpoint; ``ETag`` is its revision."""
    async with core.database.read() as reader:
        return _tagged(await _one(reader, name), response)


@router.delete("/{name}", status_code=204)
async def delete(core: Core, name: str) -> None:
    """Delete an Endpoint; its Deployments stay."""
    await core.decide(lambda now: edits.delete_endpoint(now, name), DesiredStateReader.revision)


@router.post("/{name}/settle")
async def settle(core: Core, name: str, response: Response, body: SettleBody | None = None) -> Endpoint:
    """End a roll-over whose target is ready: replaced Deployments that `deploy` made go to sleep.

    409 when the Endpoint has changed since ``revision``; settled already: nothing happens.
    """
    seen = body.revision if body else None
    found = await core.decide(lambda now: rollover.settle(now, name, seen), lambda reader: _one(reader, name))
    return _tagged(found, response)


async def _one(reader: DesiredStateReader, name: str) -> Endpoint:
    found = await reader.endpoints(name)
    if not found:
        raise NotFound(f"There is no Endpoint {name[:80]!r}.")
    return found[0]


def _tagged(found: Endpoint, response: Response) -> Endpoint:
    response.headers["ETag"] = f'"{found.revision}"'
    return found
