"""Which policies are dropped with their models, in a database in memory."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from services.registry.adapters.sql import policies, tables
from services.registry.domain.model_policy import ModelPolicy, RetentionPolicy, Stage

pytestmark = pytest.mark.unit


async def test_the_stages_of_a_model_outlive_it() -> None:
    rules = ModelPolicy(stages=[Stage(name="production", approvals=2)], serve_from="production")
    retention = RetentionPolicy(keep_last=3)
    engine = create_async_engine("sqlite+aiosqlite://")
    async with engine.begin() as connection:
        await connection.run_sync(tables.metadata.create_all)
        await policies.put(connection, "ruled", rules.model_copy(update={"retention": retention}))
        await policies.put(connection, "plain", ModelPolicy(retention=retention))
        await policies.drop_unused(connection)
        assert await policies.read(connection) == {"ruled": rules}
    await engine.dispose()
