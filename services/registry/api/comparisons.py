"""Route of the comparison of two versions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel

from services.registry.api.dependencies import TransactionsDep
from services.registry.application.resolution import version_of
from services.registry.domain.comparison import Comparison, compare
from services.registry.domain.references import parse
from tidegate.kernel.protocol.models import Version
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/compare", tags=["models"], route_class=JsonRoute)

_WRITTEN = "NAME@3, NAME@ALIAS, NAME@latest or NAME (its latest version)."


class Compared(BaseModel):
    """Two versions and their comparison."""

    a: Version
    b: Version
    comparison: Comparison


@router.get("")
async def compare_versions(
    transactions: TransactionsDep,
    a: Annotated[str, Query(description=_WRITTEN)],
    b: Annotated[str, Query(description=_WRITTEN)],
) -> Compared:
    """Compare two versions: metadata, metrics, signature, size and requirements."""
    one, two = parse(a), parse(b)
    async with transactions.read() as reader:
        ours, theirs = await version_of(reader, one), await version_of(reader, two)
    return Compared(a=ours, b=theirs, comparison=compare(ours, theirs))
