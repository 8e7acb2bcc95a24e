"""Databases of earlier revisions with rows: a migration keeps every row, and the registry serves them."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from alembic import command

from services.registry.adapters.sql import migrate
from services.registry.adapters.sql.database import engine_for
from services.registry.app import build
from services.registry.settings import RegistrySettings
from tests.integration.registry import postgres as postgresql
from tests.integration.registry.conftest import NO_BROKER, TOKEN, _admin, _emptied

OLD = sorted((Path(__file__).parent / "old").glob("*.sql"))


@pytest.fixture(params=OLD, ids=lambda path: path.stem)
def dump(request: pytest.FixtureRequest) -> Path:
    """A database of an earlier revision as SQL; the file is named like the revision."""
    found: Path = request.param
    return found


@pytest.fixture
async def old_url(server: postgresql.Server | str, dump: Path, tmp_path: Path) -> AsyncIterator[str]:
    """The database of ``dump``; on PostgreSQL the tables of its revision, with the dump's rows."""
    if isinstance(server, str) and not server:
        path = tmp_path / "old.db"
        with closing(sqlite3.connect(path)) as made:
            made.executescript(dump.read_text())
        yield f"sqlite+aiosqlite:///{path}"
        return
    if isinstance(server, str):
        await _emptied(server)
        await _fill(server, dump)
        yield server
        return
    name = f"old{os.urandom(8).hex()}"
    async with _admin(server) as admin:
        await admin.execute(f"CREATE DATABASE {name}")
        await _fill(server.url(name), dump)
        yield server.url(name)
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def _fill(url: str, dump: Path) -> None:
    engine = engine_for(url)
    async with engine.begin() as connection:
        await connection.run_sync(lambda c: command.upgrade(migrate.config_for(c), dump.stem))
        await connection.execute(sa.text("DELETE FROM revision"))
        for line in dump.read_text().splitlines():
            if line.startswith("INSERT INTO ") and "alembic_version" not in line:
                await connection.exec_driver_sql(line)
    await engine.dispose()


def rows_of(connection: sa.Connection) -> dict[str, list[dict[str, Any]]]:
    """Return every row of every table, as it is stored."""
    metadata = sa.MetaData()
    metadata.reflect(connection)
    metadata.remove(metadata.tables["alembic_version"])
    return {
        name: sorted((dict(row) for row in connection.execute(sa.select(table)).mappings()), key=repr)
        for name, table in metadata.tables.items()
    }


async def stored(url: str) -> dict[str, list[dict[str, Any]]]:
    engine = engine_for(url)
    async with engine.connect() as connection:
        found = await connection.run_sync(rows_of)
    await engine.dispose()
    return found


async def test_a_migration_keeps_every_row(old_url: str):
    before = await stored(old_url)
    assert before["endpoint_targets"], "the dump has rows"
    await migrate.migrate(old_url)
    after = await stored(old_url)
    for table, rows in before.items():
        kept = [{key: row[key] for key in rows[0]} for row in after[table]] if rows else after[table]
        assert sorted(kept, key=repr) == rows, table
    assert await migrate.problem(old_url) is None


async def test_the_registry_serves_the_old_rows(old_url: str, dump: Path, tmp_path: Path):
    await migrate.migrate(old_url)
    settings = RegistrySettings(
        state_dir=tmp_path, service_token=TOKEN, database_url=old_url, amqp_url=NO_BROKER
    )
    app = build(settings)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", headers=headers
        ) as http,
    ):
        desired = (await http.get("/v1/intention")).raise_for_status().json()
        keys = (await http.get("/v1/keys")).raise_for_status().json()["items"]
        usage = (await http.get("/v1/usage?since=2025-01-01")).raise_for_status().json()
        query = {"filter": "accuracy > 0.9 and tags.team = vision"}
        searched = (await http.get("/v1/versions", params=query)).raise_for_status().json()
    assert [version["number"] for version in searched["items"]] == [1]
    assert [(v["number"], v["format"]) for v in desired["versions"]] == [(1, "onnx"), (3, "python")]
    assert desired["versions"][0]["metadata"]["notes"] == "Grüße"
    assert desired["versions"][0]["signature"]["inputs"][0]["shape"] == [64]
    deployments = {each["name"]: each for each in desired["deployments"]}
    assert deployments["digits-v1"]["env"] == {"MODE": "fast"}
    assert deployments["canary"]["override"]["replicas"] == 2
    (endpoint,) = desired["endpoints"]
    assert [(t["deployment"], t["weight"]) for t in endpoint["targets"]] == [
        ("digits-v1", 90),
        ("canary", 10),
    ]
    if dump.stem >= "0003":
        assert [key["name"] for key in keys] == ["ci"]
        assert usage["items"][0]["requests"] == 12
