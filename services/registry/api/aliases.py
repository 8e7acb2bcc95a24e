"""Routes of the aliases of versions."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from services.registry.adapters.sql import aliases as stored
from services.registry.adapters.sql import audit
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.bodies import Items
from services.registry.api.dependencies import TransactionsDep, guarded, set_etag
from services.registry.domain import aliases, names
from tidegate.kernel.protocol.models import LARGEST, Noun
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/models/{name}/aliases", tags=["models"], route_class=JsonRoute)
GUARDED = guarded("alias")

MOST_MOVES = 200


class Alias(BaseModel):
    """An alias, and the version that it points to."""

    alias: str
    version: int


class Move(BaseModel):
    """A move of an alias.

    ``from_version`` None: the move created the alias. ``to_version`` None: the move deleted the alias.
    """

    at: datetime
    by: str
    from_version: int | None
    to_version: int | None


class AliasHistory(BaseModel):
    """An alias and its latest moves, newest first. ``version`` None: the alias was deleted."""

    alias: str
    version: int | None
    moves: list[Move]


class AliasTarget(Noun):
    """The version that an alias points to from now on."""

    version: Annotated[int, Field(ge=1, le=LARGEST)]
    expected: Annotated[
        int | None,
        Field(
            ge=0,
            le=LARGEST,
            description="The version that the alias must point to now; 0: the alias must not exist yet.",
        ),
    ] = None


@router.get("")
async def list_aliases(transactions: TransactionsDep, name: str) -> Items[Alias]:
    """Return the aliases of a model."""
    async with transactions.read() as reader:
        found = (await stored.of_models(reader.connection, [name])).get(name, {})
        if not found and not await reader.numbers([name]):
            raise names.unknown("model", name)
    return Items(items=[Alias(alias=alias, version=number) for alias, number in found.items()])


@router.get("/{alias}")
async def get_alias(transactions: TransactionsDep, name: str, alias: str, response: Response) -> AliasHistory:
    """Return an alias and its latest moves.

    Each move has its principal, its time, and the alias's version before and after the move.
    """
    async with transactions.read() as reader:
        known = (await stored.of_models(reader.connection, [name])).get(name, {})
        entries = await audit.entries(
            reader.connection, kind="alias", name=f"{name}/{alias}", limit=MOST_MOVES
        )
    if alias not in known and not entries:
        raise aliases.unknown(name, alias, known)
    moves = [
        Move(
            at=entry["at"],
            by=entry["principal_name"],
            from_version=(entry["before"] or {}).get("version"),
            to_version=(entry["after"] or {}).get("version"),
        )
        for entry in entries
    ]
    if alias in known:
        set_etag(response, str(known[alias]))
    return AliasHistory(alias=alias, version=known.get(alias), moves=moves)


@router.put("/{alias}", dependencies=[GUARDED])
async def set_alias(
    transactions: TransactionsDep, name: str, alias: str, body: AliasTarget, response: Response
) -> Alias:
    """Point an alias to a version.

    If the body has ``expected`` and the alias does not point to that version now, return 409.
    """

    async def result(_: DesiredStateReader) -> Alias:
        set_etag(response, str(body.version))
        return Alias(alias=alias, version=body.version)

    return await transactions.decide(
        lambda now: aliases.put(now, name, alias, body.version, body.expected), result
    )


@router.delete("/{alias}", dependencies=[GUARDED], status_code=204)
async def delete_alias(transactions: TransactionsDep, name: str, alias: str) -> None:
    """Delete an alias. Its version stays."""

    async def result(_: DesiredStateReader) -> None:
        return None

    await transactions.decide(lambda now: aliases.drop(now, name, alias), result)
