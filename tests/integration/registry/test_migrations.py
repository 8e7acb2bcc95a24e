"""The migrations create exactly the tables of ``tables.py``."""

from __future__ import annotations

import subprocess
import sys

import sqlalchemy as sa
from alembic import command

from services.registry.adapters.sql import migrate
from services.registry.adapters.sql.database import RegistryDatabase, engine_for


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
    assert "of a newer Tidegate" in (await migrate.problem(database_url) or "")


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
