"""Open transactions on the registry's database: SQLite or PostgreSQL, depending on the URL."""

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

# Wait at most this many milliseconds for SQLite's lock. A migration or a backup may hold it for a short time.
SQLITE_BUSY_MS = 5_000
CONNECT_S = 10.0


def utc_now() -> datetime:
    """Return the current time, with the zone UTC."""
    return datetime.now(UTC)


def engine_for(url: str) -> AsyncEngine:
    """Return a SQLAlchemy engine for a database URL.

    A transaction begins before its first statement. So it also contains reads and DDL that come before the
    first write. If the database is an SQLite file, create the file's folder.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_async_engine(
            parsed, pool_pre_ping=True, hide_parameters=True, connect_args={"timeout": CONNECT_S}
        )
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(parsed, hide_parameters=True)
    sa.event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    sa.event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    # By default, the driver begins a transaction only at the first write. With the isolation level None, the
    # driver never begins one. Instead, ``_begin_sqlite`` begins each transaction.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={SQLITE_BUSY_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON",
    ):  # fmt: skip
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # Without IMMEDIATE, a transaction that first reads and then writes fails if another writer is active.
    writes = connection.get_execution_options().get("registry_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class RegistryDatabase:
    """The registry's database.

    ``problem``: the message of the latest failure of the database. A successful transaction resets it to
    None.
    """

    def __init__(self, url: str, clock: Clock = utc_now) -> None:
        self._engine = engine_for(url)
        self.clock = clock
        sqlite = self._engine.dialect.name == "sqlite"
        self._reads = (
            self._engine if sqlite else self._engine.execution_options(isolation_level="REPEATABLE READ")
        )
        self._writes = self._engine.execution_options(registry_writes=True)
        # With this lock, the writers of this process wait in order, instead of polling SQLite's lock.
        self._write_lock: AbstractAsyncContextManager[None] = asyncio.Lock() if sqlite else nullcontext()
        self.problem: str | None = None

    @property
    def engine(self) -> AsyncEngine:
        """Return the SQLAlchemy engine, which migrations need."""
        return self._engine

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[DesiredStateReader]:
        """Open a read transaction. All its reads see the same state.

        Raise Unavailable if the database fails.
        """
        with self._translating_errors():
            async with self._reads.connect() as connection, connection.begin():
                yield DesiredStateReader(connection, self.clock())

    @asynccontextmanager
    async def write(self) -> AsyncIterator[DesiredStateWriter]:
        """Open a write transaction. Commit it after the block, or roll it back on an error.

        Only one write transaction is open at a time. Raise Unavailable if the database fails. Raise Conflict
        if the database rejects a primary key or a foreign key. Raise BadRequest if it rejects a value, such
        as a text that is too long.
        """
        with self._translating_errors():
            async with self._write_lock, self._writes.begin() as connection:
                writer = DesiredStateWriter(connection, self.clock())
                await writer.begin()
                yield writer
                await writer.finish()

    async def probe(self) -> None:
        """Test if the database can be written, and set ``problem``. Errors are only logged."""
        try:
            async with self.write() as writer:
                await writer.probe()
        except Unavailable as error:
            log.warning("database probe failed", extra={"problem": error.message})

    def _translating_errors(self) -> _ErrorTranslation:
        return _ErrorTranslation(self)


class _ErrorTranslation:
    """Context manager that translates the driver's errors and sets the database's ``problem``."""

    def __init__(self, database: RegistryDatabase) -> None:
        self._database = database

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            self._database.problem = None
        elif isinstance(error, IntegrityError):
            raise Conflict(
                "Another request has just changed or deleted an object that this request names. Read the "
                "object again and repeat the request."
            ) from error
        elif _refuses_value(error):
            raise BadRequest(
                f"The database does not accept a value of this request: {_cause(error)}."
            ) from error
        elif isinstance(error, DBAPIError | PoolTimeout | OSError):
            self._database.problem = f"The registry's database has failed: {_cause(error)}."
            raise Unavailable(self._database.problem) from error


def _refuses_value(error: BaseException) -> bool:
    """Return True if a value in the request caused the error, so that a retry would fail again."""
    if isinstance(error, DBAPIError):
        # For some wrong values, asyncpg raises only a general exception, whose SQL state begins with 22
        # ("data exception").
        state = getattr(error.orig, "sqlstate", None) or ""
        return isinstance(error, DataError) or str(state).startswith("22")
    # SQLite's driver raises OverflowError for an integer of more than 64 bits.
    return isinstance(error, OverflowError)


def _cause(error: BaseException) -> BaseException | None:
    return error.orig if isinstance(error, DBAPIError) else error
