"""Copy the registry's database: SQLite with its backup API, PostgreSQL with its own programs."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from tidegate.stack.backup_file import BackupError

SQLITE, POSTGRESQL = "sqlite", "postgresql"
_LIMIT_S = 3600.0


def kind_of(url: str) -> str:
    """Return the kind of a database URL: ``sqlite`` or ``postgresql``."""
    return SQLITE if url.startswith("sqlite") else POSTGRESQL


def sqlite_path(url: str) -> Path:
    """Return the path in an SQLite URL.

    ``sqlite:///a.db`` has a relative path, and ``sqlite:////a.db`` has an absolute path.
    """
    return Path(unquote(url.partition("://")[2].partition("?")[0].removeprefix("/"))).absolute()


def copy_sqlite(source: Path, target: Path) -> None:
    """Make a consistent copy of a database, even if it is in use. Raise BackupError if this fails."""
    try:
        with closing(sqlite3.connect(source, timeout=30)) as live, closing(sqlite3.connect(target)) as copy:
            live.backup(copy)
            # Switch off the write-ahead log, so that the copy is a single file.
            copy.execute("PRAGMA journal_mode=DELETE")
            (state,) = copy.execute("PRAGMA quick_check").fetchone()
    except sqlite3.Error as error:
        raise BackupError(f"{source} cannot be copied: {error}.") from None
    if state != "ok":
        raise BackupError(f"{source} is damaged: {state}.")


def counts(path: Path) -> dict[str, int]:
    """Return the number of rows of the main tables in a copy of the registry's database."""
    with closing(sqlite3.connect(path)) as copy:
        there = {name for (name,) in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        wanted = [
            each for each in ("models", "versions", "deployments", "endpoints", "api_keys") if each in there
        ]
        return {each: copy.execute(f'SELECT count(*) FROM "{each}"').fetchone()[0] for each in wanted}


def schema(path: Path) -> str | None:
    """Return the schema revision of a copy of the registry's database; None if the copy has no tables."""
    with closing(sqlite3.connect(path)) as copy:
        try:
            row = copy.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.OperationalError:
            return None
    return str(row[0]) if row else None


def artifacts(path: Path) -> set[str]:
    """Return the digests of the artifacts to which a copy of the registry's database refers."""
    with closing(sqlite3.connect(path)) as copy:
        return {sha256 for (sha256,) in copy.execute("SELECT DISTINCT artifact_sha256 FROM versions")}


def dump_postgresql(url: str, target: Path) -> None:
    """Write a dump of the database in PostgreSQL's own format. Raise BackupError if this fails."""
    place, environment = _connection(url)
    _run("pg_dump", ["--format=custom", "--no-owner", f"--file={target}", f"--dbname={place}"], environment)


def load_postgresql(url: str, source: Path, *, replace: bool) -> None:
    """Load a dump into the database, in one transaction. ``replace``: True to drop existing tables first."""
    place, environment = _connection(url)
    options = ["--no-owner", "--single-transaction", "--exit-on-error", f"--dbname={place}"]
    _run("pg_restore", [*options, *(["--clean", "--if-exists"] if replace else []), str(source)], environment)


def postgresql_is_empty(url: str) -> bool:
    """Return True if the database has no tables of the registry."""
    place, environment = _connection(url)
    query = "SELECT count(*) FROM pg_tables WHERE tablename = 'alembic_version'"
    count = _run(
        "psql", ["--no-psqlrc", "--tuples-only", "--no-align", f"--command={query}", place], environment
    )
    return count.strip() == "0"


def _connection(url: str) -> tuple[str, dict[str, str]]:
    """Return the URL for PostgreSQL's programs, and an environment with the URL's password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    user = f"{parts.username}@" if parts.username else ""
    # Rename the option `ssl` of the registry's driver, because PostgreSQL's programs call it `sslmode`.
    options = [("sslmode" if name == "ssl" else name, value) for name, value in parse_qsl(parts.query)]
    place = urlunsplit(("postgresql", f"{user}{host}", parts.path, urlencode(options, safe="/"), ""))
    password = {"PGPASSWORD": unquote(parts.password)} if parts.password else {}
    return place, {**os.environ, **password}


def _run(program: str, arguments: list[str], environment: Mapping[str, str]) -> str:
    found = shutil.which(program)
    if found is None:
        raise BackupError(
            f"The registry uses PostgreSQL, and {program} is not installed: install the package "
            "postgresql-client, in the server's version or a later one."
        )
    done = subprocess.run(
        [found, *arguments], env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    if done.returncode:
        raise BackupError(f"{program} failed: {done.stderr.strip()[-1000:]}")
    return done.stdout
