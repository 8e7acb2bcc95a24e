"""Migrate the database's tables, and check if they are up to date."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from services.registry.adapters.sql.database import engine_for

_SCRIPTS = Path(__file__).parent / "migrations"
# The number of the PostgreSQL advisory lock that lets only one `migrate` run at a time. The number is
# arbitrary.
_LOCK = 7_416_001
# The message of a problem contains this text only if a newer Tidegate has migrated the database. ``_upgrade``
# searches the message for it.
NEWER = "which a newer Tidegate made"


class NewerDatabase(Exception):
    """The error for a database that a newer Tidegate has migrated. The message has the remedy."""


def config_for(connection: sa.Connection | None = None) -> Config:
    """Return Alembic's configuration. ``migrations/env.py`` reads the connection from it."""
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


async def migrate(url: str) -> None:
    """Migrate the database to the newest revision, unless it is up to date.

    Raise NewerDatabase if a newer Tidegate has migrated the database.
    """
    engine = engine_for(url)
    try:
        async with engine.execution_options(registry_writes=True).begin() as connection:
            await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


def _upgrade(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    if (problem := _problem(connection)) is None:
        return
    if NEWER in problem:
        raise NewerDatabase(problem)
    command.upgrade(config_for(connection), "head")


async def problem(url: str) -> str | None:
    """Return what is wrong with the tables, and how to fix it; None if they are up to date."""
    engine = engine_for(url)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(_problem)
    finally:
        await engine.dispose()


def _problem(connection: sa.Connection) -> str | None:
    current = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(config_for())
    newest = scripts.get_current_head()
    if current == newest:
        return None
    if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
        return f"The database is at revision {current}, {NEWER}. Run that version of Tidegate or a later one."
    return (
        f"The database is at revision {current or 'none'}, but this Tidegate needs {newest}. "
        "Run `python -m services.registry migrate`."
    )
