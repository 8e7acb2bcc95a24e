"""Backups of a registry on PostgreSQL, with the real programs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.registry.adapters.sql import migrate
from services.registry.adapters.sql.database import RegistryDatabase
from tests.integration.registry import postgres as postgresql
from tests.integration.registry.conftest import TEMPLATE, _admin
from tidegate.kernel.settings.base import Settings
from tidegate.stack import databases
from tidegate.stack.backup import backup
from tidegate.stack.backup_file import BackupError
from tidegate.stack.restore import restore


@pytest.fixture
async def urls(postgres: postgresql.Server) -> AsyncIterator[tuple[str, str]]:
    """A migrated database, and an empty one."""
    names = [f"kept{os.urandom(6).hex()}" for _ in range(2)]
    async with _admin(postgres) as admin:
        await admin.execute(f"CREATE DATABASE {names[0]} TEMPLATE {TEMPLATE}")
        await admin.execute(f"CREATE DATABASE {names[1]}")
        yield postgres.url(names[0]), postgres.url(names[1])
        for name in names:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def artifacts(url: str) -> int | None:
    database = RegistryDatabase(url)
    async with database.read() as reader:
        found = await reader.artifact_size("ab" * 32)
    await database.close()
    return found


async def test_a_database_comes_back(urls: tuple[str, str], tmp_path: Path):
    source, target = urls
    database = RegistryDatabase(source)
    async with database.write() as writer:
        await writer.note_artifact("ab" * 32, 7, writer.now)
    await database.close()
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "data").mkdir(parents=True)
    manifest = backup(Settings(state_dir=old, database_url=source), tmp_path / "b.tar")
    assert list(manifest.files) == ["database.dump"]

    restore(Settings(state_dir=new, database_url=target), tmp_path / "b.tar")
    assert await artifacts(target) == 7
    assert await migrate.problem(target) is None

    with pytest.raises(BackupError, match="Data exists already: the tables in PostgreSQL"):
        restore(Settings(state_dir=new, database_url=target), tmp_path / "b.tar")
    restore(Settings(state_dir=new, database_url=target), tmp_path / "b.tar", force=True)
    assert await artifacts(target) == 7


def test_the_error_of_postgresql_is_shown(tmp_path: Path):
    url = f"postgresql+asyncpg://u:secret@/d?host={tmp_path}&ssl=disable"
    with pytest.raises(BackupError, match=r"pg_dump failed: .*connection to server") as refused:
        databases.dump_postgresql(url, tmp_path / "dump")
    assert "secret" not in str(refused.value)
