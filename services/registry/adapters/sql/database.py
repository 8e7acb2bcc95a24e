"""The connection to the registry's database: SQLite with one writer, or PostgreSQL, by URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.writing import DesiredStateWriter
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, Conflict, Unavailable

log = telemetry.logger(__name__)

Clock = Callable[[], datetime]

# Another process (a migration, a backup) may hold SQLite's lock for a moment.
SQLITE_BUSY_MS = 5_000


def utc_now() -> datetime:
    """The clock of the registry."""
    return datetime.now(UTC)


def engine_for(url: str) -> AsyncEngine:
    """An engine whose transactions are real ones on either database; makes SQLite's folder."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_async_engine(parsed, pool_pre_ping=True, hide_parameters=True)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(parsed, hide_parameters=True)
    sa.event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    sa.event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    # The driver's own idea of when to begin leaves DDL and reads outside of transactions.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={SQLITE_BUSY_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON",
    ):  # fmt: skip
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later cannot wait for another writer: it fails.
    writes = connection.get_execution_options().get("registry_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class RegistryDatabase:
    """Transactions for reading and for writing. ``problem``: None when the last one went well."""

    def __init__(self, url: str, clock: Clock = utc_now) -> None:
        self._engine = engine_for(url)
        self.clock = clock
        sqlite = self._engine.dialect.name == "sqlite"
        self._reads = (
            self._engine if sqlite else self._engine.execution_options(isolation_level="REPEATABLE READ")
        )
        self._writes = self._engine.execution_options(registry_writes=True)
        # In this process writers queue here, in order, rather than poll SQLite's lock.
        self._turn: AbstractAsyncContextManager[None] = asyncio.Lock() if sqlite else nullcontext()
        self.problem: str | None = None

    @property
    def engine(self) -> AsyncEngine:
        """The engine itself, for migrations."""
        return self._engine

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[DesiredStateReader]:
        """One consistent read; raises Unavailable."""
        with self._judged():
            async with self._reads.connect() as connection, connection.begin():
                yield DesiredStateReader(connection, self.clock())

    @asynccontextmanager
    async def write(self) -> AsyncIterator[DesiredStateWriter]:
        """One change, alone of its kind: committed when the block ends well, else undone.

        Raises Unavailable when the database fails, Conflict when it refuses a reference, BadRequest when it
        refuses a value: too long, too large, or not to be written in it at all.
        """
        with self._judged():
            async with self._turn, self._writes.begin() as connection:
                writer = DesiredStateWriter(connection, self.clock())
                await writer.begin()
                yield writer
                await writer.finish()

    async def probe(self) -> None:
        """Find out whether the database can be written; ``problem`` has the answer."""
        try:
            async with self.write() as writer:
                await writer.probe()
        except Unavailable as error:
            log.warning("database probe failed", extra={"problem": error.message})

    def _judged(self) -> _Judged:
        return _Judged(self)


class _Judged:
    """Translates the driver's errors, and remembers whether the last transaction worked."""

    def __init__(self, database: RegistryDatabase) -> None:
        self._database = database

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            self._database.problem = None
        elif isinstance(error, IntegrityError):
            raise Conflict("What this refers to has just been changed or deleted: read it again.") from error
        elif _refuses_value(error):
            raise BadRequest(f"The database does not take a value of this: {_cause(error)}.") from error
        elif isinstance(error, DBAPIError | PoolTimeout | OSError):
            self._database.problem = f"The registry's database does not work: {_cause(error)}."
            raise Unavailable(self._database.problem) from error


def _refuses_value(error: BaseException) -> bool:
    """Whether the fault is in what was to be written, so that it is the same the next time."""
    if isinstance(error, DBAPIError):
        # The dialect of asyncpg has no class of its own for these, only the state: class 22, data exception.
        state = getattr(error.orig, "sqlstate", None) or ""
        return isinstance(error, DataError) or str(state).startswith("22")
    return isinstance(error, OverflowError)  # of SQLite's driver, for a number of more than 64 bits


def _cause(error: BaseException) -> BaseException | None:
    return error.orig if isinstance(error, DBAPIError) else error
