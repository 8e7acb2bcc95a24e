"""Bringing the database's tables up to date, and finding out whether they are."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from services.registry.adapters.sql.database import engine_for

_SCRIPTS = Path(__file__).parent / "migrations"
# Any number, as long as it stays: two `migrate` on one PostgreSQL take turns by it.
_LOCK = 7_416_001


def config_for(connection: sa.Connection | None = None) -> Config:
    """Alembic's configuration; ``migrations/env.py`` takes its connection from it."""
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


async def migrate(url: str) -> None:
    """Bring the database to the newest revision; does nothing when it is there already."""
    engine = engine_for(url)
    try:
        async with engine.execution_options(registry_writes=True).begin() as connection:
            await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


def _upgrade(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    if _problem(connection) is not None:
        command.upgrade(config_for(connection), "head")


async def problem(url: str) -> str | None:
    """None when the tables are those that this program knows, else what is wrong and what to do."""
    engine = engine_for(url)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(_problem)
    finally:
        await engine.dispose()


def _problem(connection: sa.Connection) -> str | None:
    have = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(config_for())
    want = scripts.get_current_head()
    if have == want:
        return None
    if have is not None and have not in {script.revision for script in scripts.walk_revisions()}:
        return f"The database is at revision {have}, of a newer Tidegate: run that one."
    return (
        f"The database is at revision {have or 'none'}, this Tidegate needs {want}: "
        "run `python -m services.registry migrate`."
    )
