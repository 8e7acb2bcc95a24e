"""Read and write the stages and approvals of versions in SQL."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql import keys
from services.registry.adapters.sql.tables import stage_approvals, versions
from services.registry.domain.stages import Approval


class StoredStage(NamedTuple):
    """The stage of a version, and the principal that registered the version."""

    stage: str | None
    registered_by: str | None


async def staged(connection: AsyncConnection) -> dict[tuple[str, int], str]:
    """Return the stage of each version that is in a stage."""
    query = sa.select(versions.c.model, versions.c.number, versions.c.stage)
    rows = await connection.execute(query.where(versions.c.stage.is_not(None)))
    return {(model, number): stage for model, number, stage in rows}


async def find(connection: AsyncConnection, model: str, number: int) -> StoredStage:
    """Return the stage of a version, and the principal that registered it. The version must exist."""
    query = sa.select(versions.c.stage, versions.c.created_by)
    row = (await connection.execute(query.where(_is(model, number)))).one()
    return StoredStage(row.stage, row.created_by)


async def put(connection: AsyncConnection, model: str, number: int, stage: str | None) -> None:
    """Set the stage of a version."""
    await connection.execute(sa.update(versions).where(_is(model, number)).values(stage=stage))


async def approvals(connection: AsyncConnection, model: str, number: int) -> list[Approval]:
    """Return the approvals of a version, oldest first."""
    mine = (stage_approvals.c.model == model) & (stage_approvals.c.number == number)
    rows = await connection.execute(sa.select(stage_approvals).where(mine).order_by(stage_approvals.c.at))
    found = rows.all()
    owners = await keys.owners(connection, {row.principal for row in found})
    return [
        Approval(row.stage, row.principal, row.name, row.at, row.comment, owners.get(row.principal))
        for row in found
    ]


async def approve(connection: AsyncConnection, model: str, number: int, approval: Approval) -> None:
    """Write an approval. It replaces an earlier approval by the same principal for the same stage."""
    await withdraw(connection, model, number, approval.stage, approval.principal)
    await connection.execute(
        sa.insert(stage_approvals).values(
            model=model,
            number=number,
            stage=approval.stage,
            principal=approval.principal,
            name=approval.by,
            comment=approval.comment,
            at=approval.at,
        )
    )


async def withdraw(connection: AsyncConnection, model: str, number: int, stage: str, principal: str) -> bool:
    """Delete an approval. Return False if it does not exist."""
    mine = (
        (stage_approvals.c.model == model)
        & (stage_approvals.c.number == number)
        & (stage_approvals.c.stage == stage)
        & (stage_approvals.c.principal == principal)
    )
    return bool((await connection.execute(sa.delete(stage_approvals).where(mine))).rowcount)


async def drop(connection: AsyncConnection, model: str, number: int) -> None:
    """Delete the approvals of a version."""
    mine = (stage_approvals.c.model == model) & (stage_approvals.c.number == number)
    await connection.execute(sa.delete(stage_approvals).where(mine))


def _is(model: str, number: int) -> sa.ColumnElement[bool]:
    return (versions.c.model == model) & (versions.c.number == number)
