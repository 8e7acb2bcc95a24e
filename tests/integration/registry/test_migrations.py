"""The migrations create exactly the tables of ``tables.py``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory

from services.registry.adapters.sql import migrate
from services.registry.adapters.sql.database import RegistryDatabase, engine_for
from tests.integration.registry.conftest import Open
from tests.integration.registry.onnx_files import onnx_bytes


async def test_migrations_and_tables_agree(database_url):
    engine = engine_for(database_url)

    def check(connection: sa.Connection) -> None:
        command.check(migrate.config_for(connection))

    async with engine.begin() as connection:
        await connection.run_sync(check)
    await engine.dispose()


async def test_migrate_is_idempotent_and_goes_down_again(database_url):
    await migrate.migrate(database_url)
    assert await migrate.problem(database_url) is None
    engine = engine_for(database_url)

    def down(connection: sa.Connection) -> None:
        command.downgrade(migrate.config_for(connection), "base")

    async with engine.execution_options(registry_writes=True).begin() as connection:
        await connection.run_sync(down)
        assert await connection.run_sync(lambda c: sa.inspect(c).get_table_names()) == ["alembic_version"]
    await engine.dispose()
    assert "migrate" in (await migrate.problem(database_url) or "")
    await migrate.migrate(database_url)
    assert await migrate.problem(database_url) is None


async def test_newer_database_is_not_touched(database_url):
    engine = engine_for(database_url)
    async with engine.begin() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    await engine.dispose()
    assert "a newer Tidegate made" in (await migrate.problem(database_url) or "")
    with pytest.raises(migrate.NewerDatabase, match="a newer Tidegate made"):
        await migrate.migrate(database_url)


async def test_database_that_is_away_is_a_health_problem(tmp_path):
    database = RegistryDatabase(f"sqlite+aiosqlite:///{tmp_path}/absent.db")
    await database.probe()
    assert "database has failed" in (database.problem or "")
    await database.close()


def test_command_line(tmp_path):
    environment = {"TIDEGATE_STATE_DIR": str(tmp_path), "TIDEGATE_SERVICE_TOKEN": "t", "PATH": ""}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command_line = [sys.executable, "-m", "services.registry", *arguments]
        return subprocess.run(command_line, env=environment, capture_output=True, text=True, check=False)

    refused = run()
    assert refused.returncode == 1
    assert "Run `python -m services.registry migrate`" in refused.stderr
    done = run("migrate")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "data" / "registry.db").is_file()


async def test_data_survives_the_way_down_and_up_again(opened: Open, database_url: str) -> None:
    """Each step down and up runs on tables with rows. What older releases also had is still there."""
    upload = {"sha256": "0" * 64, "size": 7}
    async with opened() as call:
        await call.register("digits", onnx_bytes(1), metadata={"notes": "kept"})
        await call("POST", "/v1/deploy", {"model": "digits", "version": 1, "endpoint": "digits"})
        await call("POST", "/v1/keys", {"name": "ci", "scopes": ["infer"]})
        await call("POST", "/v1/uploads", upload, status=201)
        before = await call("GET", "/v1/desired-state")
        assert before["versions"][0]["metadata"]["notes"] == "kept"
    engine = engine_for(database_url)
    scripts = ScriptDirectory.from_config(migrate.config_for())
    revisions = [script.revision for script in scripts.walk_revisions()]  # the newest one first

    def step(connection: sa.Connection, to: str) -> None:
        command.downgrade(migrate.config_for(connection), to)

    for down in revisions[1:]:
        async with engine.execution_options(registry_writes=True).begin() as connection:
            await connection.run_sync(step, down)
    await engine.dispose()
    await migrate.migrate(database_url)
    async with opened() as call:
        assert await call("GET", "/v1/desired-state") == before
        assert (await call("GET", "/v1/uploads"))["items"] == []
