"""A wrong database URL is one line that says what to do, without the password."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.registry.adapters.sql import connection_problem, migrate
from services.registry.adapters.sql.database import engine_for
from tests.integration.registry import postgres as postgresql

SECRET = "wrong-secret"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            "postgresql://u:wrong-secret@host/x",
            "begins with postgresql://, and no driver for it is installed",
        ),
        ("mysql+aiomysql://u:wrong-secret@host/x", "Write sqlite"),
        ("no url", "is not the URL of a database"),
        ("postgresql+asyncpg://u:wrong-secret@host:port/x", "is not the URL of a database"),
    ],
)
def test_a_url_without_a_driver(url: str, words: str) -> None:
    found = connection_problem.of_url(url) or ""
    assert words in found
    assert SECRET not in found


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql+asyncpg://u:wrong-secret@127.0.0.1:9/x", "PostgreSQL at 127.0.0.1:9 does not answer"),
        ("postgresql+asyncpg://u:wrong-secret@absent.invalid/x", "absent.invalid:5432 does not answer"),
        ("postgresql+asyncpg://u:wrong-secret@127.0.0.1:9/x?ssl=maybe", "sslmode"),
        ("sqlite+aiosqlite:////proc/none/x.db", "/proc/none/x.db cannot be opened"),
    ],
)
async def test_a_database_that_cannot_be_opened(url: str, words: str) -> None:
    assert connection_problem.of_url(url) is None
    found = await _problem(url)
    assert words in found
    assert "TIDEGATE_DATABASE_URL" in found


async def test_a_user_a_password_and_a_database_that_are_wrong(postgres: postgresql.Server) -> None:
    url = postgres.url("postgres")
    engine = engine_for(url)
    async with engine.begin() as connection:
        found = await connection.execute(sa.text("SELECT 1 FROM pg_roles WHERE rolname = 'guarded'"))
        if found.first() is None:
            await connection.execute(sa.text("CREATE ROLE guarded LOGIN PASSWORD 'right'"))
    await engine.dispose()
    guarded = url.replace("tidegate@", f"{postgresql.GUARDED}:{SECRET}@")
    refused = await _problem(guarded)
    assert "refuses the user 'guarded': password authentication failed" in refused
    assert "does not exist" in await _problem(url.replace("tidegate@", "nobody@"))
    assert "has no database 'absent'. Create it" in await _problem(postgres.url("absent"))
    assert "Make this user the owner" in await _problem(guarded.replace(SECRET, "right"))


def test_the_command_prints_one_line(tmp_path: Path) -> None:
    environment = {
        "TIDEGATE_STATE_DIR": str(tmp_path),
        "TIDEGATE_SERVICE_TOKEN": "t",
        "TIDEGATE_DATABASE_URL": f"postgresql+asyncpg://u:{SECRET}@127.0.0.1:9/x",
        "PATH": "",
    }
    command = [sys.executable, "-m", "services.registry", "migrate"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("tidegate registry: PostgreSQL at 127.0.0.1:9 does not answer")
    assert done.stderr.count("\n") == 1


async def _problem(url: str) -> str:
    try:
        await migrate.migrate(url)
    except connection_problem.OPENING as error:
        found = connection_problem.of_error(url, error)
        assert "\n" not in found
        assert SECRET not in found
        return found
    raise AssertionError(f"{url} was opened")
