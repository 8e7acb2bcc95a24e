"""The route that searches the versions of all models, and query parameters of list routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from services.registry.adapters.sql.aliases import of_models
from services.registry.adapters.sql.deleted import states
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.search import Search, find
from services.registry.api.bodies import Page, VersionInfo
from services.registry.api.dependencies import TransactionsDep
from services.registry.domain import filters, pages
from services.registry.domain.pages import NamedPage
from tidegate.kernel.protocol.models import Version
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/versions", tags=["models"], route_class=JsonRoute)


def _search(
    filter_: Annotated[
        str,
        Query(alias="filter", max_length=filters.LONGEST, description=f"Conditions: `{filters.EXAMPLE}`."),
    ] = "",
    order_by: Annotated[
        str | None,
        Query(max_length=400, description="Sort key, then asc (default) or desc: `metrics.accuracy desc`."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=pages.MOST)] = pages.MOST,
    cursor: Annotated[str | None, Query(description="The `next` of the previous page.")] = None,
    deleted: Annotated[
        bool, Query(description="Only versions that are deleted and can be restored.")
    ] = False,
) -> Search:
    order = filters.parse_order(order_by) if order_by else None
    return Search(filters.parse(filter_), order, limit, cursor, deleted)


def _named_page(
    limit: Annotated[
        int | None,
        Query(ge=1, le=pages.MOST, description="Maximum number of objects on a page; default: all objects."),
    ] = None,
    cursor: Annotated[str | None, Query(description="The `next` of the previous page.")] = None,
) -> NamedPage:
    return pages.named_page(limit, cursor)


NamedPageDep = Annotated[NamedPage, Depends(_named_page)]
SearchDep = Annotated[Search, Depends(_search)]


@router.get("")
async def search_versions(transactions: TransactionsDep, search: SearchDep) -> Page[VersionInfo]:
    """Return the versions of all models that match ``filter``.

    They are sorted by ``order_by``, or else by model and number.
    """
    async with transactions.read() as reader:
        found, following = await find(reader.connection, search)
        return Page(items=await informed(reader, found), next=following)


async def informed(reader: DesiredStateReader, found: Sequence[Version]) -> list[VersionInfo]:
    """Return these versions with their aliases, their stages, and the times of their deletion."""
    models = {version.model for version in found}
    known, special = await of_models(reader.connection, models), await states(reader.connection, models)
    named: dict[tuple[str, int], list[str]] = {}
    for model, by_alias in known.items():
        for alias, number in by_alias.items():
            named.setdefault((model, number), []).append(alias)
    return [
        VersionInfo.model_construct(
            **dict(each),
            aliases=named.get((each.model, each.number), []),
            deleted_at=special.get((each.model, each.number), (None, None))[0],
            stage=special.get((each.model, each.number), (None, None))[1],
        )
        for each in found
    ]
