"""Read and write the policies of models in SQL."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import model_policies, versions
from services.registry.domain.model_policy import ModelPolicy


async def read(connection: AsyncConnection) -> dict[str, ModelPolicy]:
    """Return the policies by model. Models with the default policy are left out."""
    rows = await connection.execute(sa.select(model_policies.c.model, model_policies.c.document))
    return {model: ModelPolicy.model_validate(document) for model, document in rows}


async def put(connection: AsyncConnection, model: str, policy: ModelPolicy) -> None:
    """Write a model's policy. The default policy is not stored."""
    await connection.execute(sa.delete(model_policies).where(model_policies.c.model == model))
    document = policy.model_dump(mode="json", exclude_defaults=True)
    if document:
        await connection.execute(sa.insert(model_policies).values(model=model, document=document))


async def drop_unused(connection: AsyncConnection) -> None:
    """Reset the policies of models whose versions are all removed permanently. Keep the stage rules.

    Only an admin may change the rules for stages. If this function deleted them, a publisher could get rid of
    them: the publisher could delete a model permanently and register it again.
    """
    used = sa.exists().where(versions.c.model == model_policies.c.model)
    rows = await connection.execute(sa.select(model_policies.c.model, model_policies.c.document).where(~used))
    for model, document in rows.all():
        policy = ModelPolicy.model_validate(document)
        kept = ModelPolicy(stages=policy.stages, serve_from=policy.serve_from)
        if kept != policy:
            await put(connection, model, kept)
